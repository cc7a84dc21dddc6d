"""Make the trained model a version of the registered model in MLflow, and its champion if it is the better one.

python -m jobs.register jobs/presets/demo.yaml

A version is its weights: registering them again adds to it. What a gate refuses has the alias `challenger`.
"""

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import ray
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

import model
from model.tokenizer import load_tokenizer
from pipeline import registry, tracking
from pipeline.artifacts import Artifact, Manifest, link_or_copy, record_file
from pipeline.config import CHALLENGER, Config, result_settings
from pipeline.corpus.documents import read_documents
from pipeline.evaluation.comparison import Change, compare_outcomes, decide, measure_gain
from pipeline.evaluation.model_card import README, Facts, summarise_card, write_card
from pipeline.evaluation.report import read_outcomes
from pipeline.evaluation.spread import Place, Version, score_documents
from pipeline.registry import GATE_TAG, PROBE_TAG, REFUSED_TAG
from pipeline.tracking import tell_settings
from pipeline.training.resources import wants_gpu, worker_resources

FORMAT_VERSION = 1
WEIGHTS_TAG = "weights_digest"
LONGEST_MODEL_PARAMETER = 250  # characters; MLflow refuses more
SUPERSEDED_TAG = "superseded_by"  # of a version that had the alias: which one took it

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),  # unnamed: one prompt, a list of them, or a column of a DataFrame
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema(
        [
            ParamSpec("max_tokens", "long", 64),
            ParamSpec("temperature", "double", 0.8),
            ParamSpec("top_k", "long", 50),
            ParamSpec("top_p", "double", 1.0),
            ParamSpec("seed", "long", 0),
        ]
    ),
)


@dataclass(frozen=True)
class Verdict:
    """Whether a version takes the alias, and why."""

    passes: bool
    reason: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # what was measured, kept with the artifact


def settings(config: Config) -> dict[str, Any]:
    return result_settings(config.register) | {"model_name": config.registered_name}


def still_holds(config: Config, manifest: Manifest) -> bool:
    """Tell whether the registry still has this version with its files, and some version under the alias it asked for.

    Which one the alias means now does not matter: what finished long ago never takes it back.
    """
    tracking.connect(config)
    client, name = mlflow.MlflowClient(), config.registered_name
    holder = find_holder(client, name, config.register.alias)
    version = str(manifest.counts["version"])
    asked = manifest.counts.get("asked_alias", manifest.counts["alias"])
    if holder is None or (holder != version and (config.register.force or asked != config.register.alias)):
        return False
    try:
        found = client.get_model_version(name, version)
    except MlflowException:
        return False
    return str(found.status) == "READY" and has_files(client, found)


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Register the best checkpoint, as a version of its weights, and let it take the alias if it has earned it."""
    trained, evaluated, prepared = (inputs[name].manifest() for name in ("train", "evaluate", "prepare"))
    assert trained is not None
    assert evaluated is not None
    assert prepared is not None
    tracking.connect(config)
    client = mlflow.MlflowClient()
    name, alias = config.registered_name, config.register.alias
    weights = digest_weights(trained)
    version = find_version(client, name, weights, output.fingerprint)
    card = write_card(Facts.of(config, inputs["prepare"], trained, inputs["evaluate"]))
    figure = f"{evaluated.counts['bits_per_byte']:.5f}"
    if version is None:
        run_id = tracking.find_run(config, inputs["train"])
        tags = {
            "fingerprint": output.fingerprint,
            WEIGHTS_TAG: weights,
            "mlflow_run_id": run_id,
            "checkpoint_url": f"{inputs['train'].url}/checkpoint",
            "evaluation_url": inputs["evaluate"].url,
            "data_digest": inputs["prepare"].fingerprint,
            "num_parameters": str(trained.counts["num_parameters"]),
            "bits_per_byte": figure,
            PROBE_TAG: f"{evaluated.counts[PROBE_TAG]:.5f}",
            **trained.counts.get("start", {}),  # the weights that it began with, and the run that made those
        }
        version = log_version(config, client, inputs["train"], trained, run_id, tags, card)
    else:  # the same weights: what is known of them is added to, never replaced
        key = f"bits_per_byte.{inputs['evaluate'].fingerprint[:8]}"
        client.set_model_version_tag(name, version, key, figure)
    client.update_model_version(name, version, summarise_card(card))
    verdict = judge(config, client, version, inputs)
    taken = move_aliases(config, client, version, verdict)
    print(f"register  version {version} of {name} is the {taken}: {verdict.reason}")
    files = {README: output.write_text(README, card)}
    if verdict.facts:
        files["comparison.json"] = output.write_text("comparison.json", json.dumps(dict(verdict.facts)) + "\n")
    counts = {"model_name": name, "version": version, "alias": taken, "asked_alias": alias, "reason": verdict.reason}
    return output.commit(counts, files)


def digest_weights(trained: Manifest) -> str:
    """Name a version's content: its weights and its tokenizer."""
    names = [name for name in sorted(trained.files) if name.startswith("checkpoint/")]
    kept = [name for name in names if name.endswith(".safetensors") or name == "checkpoint/tokenizer.json"]
    return hashlib.sha256(json.dumps([trained.files[name].sha256 for name in kept]).encode()).hexdigest()[:20]


def find_version(client: mlflow.MlflowClient, name: str, weights: str, fingerprint: str) -> str | None:
    """Find the version that has these weights, or one that was registered by this recipe before weights were noted."""
    found = client.search_model_versions(f"name = '{name}' and tags.{WEIGHTS_TAG} = '{weights}'")
    earlier = client.search_model_versions(f"name = '{name}' and tags.fingerprint = '{fingerprint}'")
    found = [*found, *(version for version in earlier if WEIGHTS_TAG not in version.tags)]
    ready = [int(version.version) for version in found if version.status == "READY" and has_files(client, version)]
    return str(max(ready)) if ready else None


def has_files(client: mlflow.MlflowClient, version: ModelVersion) -> bool:
    """Tell whether MLflow still has the model that a version points to: the model can be deleted on its own."""
    source = str(version.source)
    if not source.startswith("models:/m-"):
        return True
    try:
        client.get_logged_model(source.removeprefix("models:/"))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def find_holder(client: mlflow.MlflowClient, name: str, alias: str) -> str | None:
    """Return the version that has an alias now; None where no version or no such model has it."""
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise
        return None


# The gate -----------------------------------------------------------------------------------------------------------


def judge(config: Config, client: mlflow.MlflowClient, version: str, inputs: Mapping[str, Artifact]) -> Verdict:
    """Decide whether a version takes the alias from the one that has it."""
    name, alias = config.registered_name, config.register.alias
    holder = find_holder(client, name, alias)
    if holder is None:
        return Verdict(True, f"no other version was the {alias}")
    if holder == version:
        return Verdict(True, f"it is the {alias} already")
    if not has_files(client, client.get_model_version(name, holder)):
        return Verdict(True, f"version {holder}, the {alias} so far, has lost its files")
    if config.register.force:
        return Verdict(True, f"forced over version {holder}; the gate was not asked")
    later = client.get_model_version(name, version).tags.get(SUPERSEDED_TAG)
    if later is not None:
        return Verdict(False, f"it was the {alias} until version {later} took over, and only --force brings it back")
    if config.register.gate == "always":
        return Verdict(True, f"register.gate=always lets every version take over, here from version {holder}")
    return compare(config, registry.resolve(name, holder), inputs)


def compare(config: Config, champion: registry.VersionRecord, inputs: Mapping[str, Artifact]) -> Verdict:
    """Score candidate and champion on the candidate's held-out documents, and on the tasks that both answered."""
    against = f"against version {champion.version}: "
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(inputs["tokenizer"].download(Path(folder)))
    texts = read_documents(inputs["prepare"], tokenizer, config.register.gate_documents)
    trained = inputs["train"].manifest()
    assert trained is not None
    use_gpu = wants_gpu(config.train, workers=1, had_gpu=trained.counts.get("device") == "cuda")
    place = Place.of(trained, config.train, use_gpu, worker_resources(config.train, use_gpu))
    try:
        candidate, champions = score_documents(
            [inputs["train"], Version(champion, mlflow.get_tracking_uri())], texts, place
        )
    except ray.exceptions.RayTaskError as error:
        if not isinstance(error.cause, ValueError):
            raise
        return Verdict(False, f"{against}it cannot be scored ({error.cause}), so that nothing is shown")
    sizes = [len(text.encode()) for text in texts]
    gain = measure_gain(candidate, champions, sizes)
    changes = compare_tasks(inputs["evaluate"], champion.tags.get("evaluation_url", ""))
    decision = decide(config.register.gate, gain, changes, least_gain=config.register.least_gain)
    facts = {
        "champion": champion.version,
        "gain": asdict(gain),
        "tasks": [asdict(change) for change in changes],
        "bytes": sizes,
        "candidate_nats": candidate,
        "champion_nats": champions,
    }
    return Verdict(decision.passes, against + decision.reason, facts)


def compare_tasks(evaluation: Artifact, champions_url: str) -> list[Change]:
    """Compare the answers to the tasks that both evaluations kept, where the items are the same."""
    ours = read_outcomes(evaluation)
    if not ours or not champions_url:
        return []
    theirs = read_outcomes(Artifact(champions_url, "evaluate", ""))
    return [
        compare_outcomes(task, outcomes.right, theirs[task].right)
        for task, outcomes in ours.items()
        if task in theirs and theirs[task].digest == outcomes.digest
    ]


def move_aliases(config: Config, client: mlflow.MlflowClient, version: str, verdict: Verdict) -> str:
    """Give the version the alias it earned, write down why, and return that alias."""
    name, alias = config.registered_name, config.register.alias
    holder = find_holder(client, name, alias)
    client.set_model_version_tag(name, version, "gate", "forced" if config.register.force else config.register.gate)
    if holder == version:
        return alias
    client.set_model_version_tag(name, version, GATE_TAG, verdict.reason)
    if not verdict.passes:
        client.set_registered_model_alias(name, CHALLENGER, version)
        if holder is not None:
            client.set_model_version_tag(name, holder, REFUSED_TAG, f"version {version}: {verdict.reason}")
        return CHALLENGER
    client.set_registered_model_alias(name, alias, version)
    if find_holder(client, name, CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)
    client.delete_model_version_tag(name, version, SUPERSEDED_TAG)
    if holder is not None:
        client.set_model_version_tag(name, holder, SUPERSEDED_TAG, version)
    return alias


# MLflow's side ------------------------------------------------------------------------------------------------------


def log_version(
    config: Config,
    client: mlflow.MlflowClient,
    train: Artifact,
    trained: Manifest,
    run_id: str,
    tags: dict[str, str],
    card: str,
) -> str:
    """Copy the checkpoint into MLflow as a pyfunc model (code and safetensors, no pickle) and register it."""
    name = config.registered_name
    with tempfile.TemporaryDirectory() as folder:
        records = {key: record for key, record in trained.files.items() if key.startswith("checkpoint/")}
        checkpoint = train.download(Path(folder), records) / "checkpoint"
        (checkpoint / README).write_text(card, encoding="utf-8")
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            # MLflow wishes for type hints and an example, past any filter; hints would override the signature.
            warnings.showwarning = lambda *_, **__: None
            logged = mlflow.pyfunc.log_model(
                name=re.sub(r"[/:.%\"']", "-", name),  # what MLflow refuses in a name
                python_model=str(Path(__file__).parent / "serving" / "pyfunc.py"),
                artifacts={"checkpoint": str(checkpoint)},
                code_paths=[str(Path(str(model.__file__)).parent)],
                signature=SIGNATURE,
                pip_requirements=["torch", "tiktoken", "tokenizers", "safetensors", "numpy"],
                metadata=tags,
                params={key: str(value)[:LONGEST_MODEL_PARAMETER] for key, value in tell_settings(config).items()},
            )
            # The figure stands with the model too, where MLflow's page of models compares them.
            mlflow.log_metrics({"registered/bits_per_byte": float(tags["bits_per_byte"])}, model_id=logged.model_id)
    share_weights(train, trained, str(client.get_logged_model(logged.model_id).artifact_location))
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        name, source=logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id
    )
    return str(created.version)


def share_weights(train: Artifact, trained: Manifest, location: str) -> None:
    """Let MLflow's copy of the weights be a second name of the training's file, where both lie on one disk."""
    folder = Path(location.removeprefix("file://")) / "artifacts" / "checkpoint"
    if "://" in train.url or not folder.is_dir():
        return
    for key, record in trained.files.items():
        copy = folder / Path(key).name
        if key.startswith("checkpoint/") and copy.suffix == ".safetensors" and record_file(copy) == record:
            link_or_copy(Path(train.file(key)), copy)
