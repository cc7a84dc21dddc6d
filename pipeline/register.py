"""Make the trained model a version of the registered model in MLflow, and point the alias at it.

python -m jobs.register jobs/presets/demo.yaml
"""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

import model
from pipeline import tracking
from pipeline.artifacts import Artifact, Manifest
from pipeline.config import Config, result_settings
from pipeline.registry import PROBE_TAG

FORMAT_VERSION = 1

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


def settings(config: Config) -> dict[str, Any]:
    return result_settings(config.register) | {"model_name": config.registered_name}


def still_holds(config: Config, manifest: Manifest) -> bool:
    """Tell whether the registry still has this version, with its files, under this alias."""
    tracking.connect(config)
    client = mlflow.MlflowClient()
    try:
        version = client.get_model_version_by_alias(config.registered_name, config.register.alias)
    except MlflowException:
        return False
    return str(version.version) == str(manifest.counts["version"]) and has_files(client, version)


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Log the best checkpoint as a model, register it as a new version, move the alias."""
    trained, evaluated, prepared = (inputs[name].manifest() for name in ("train", "evaluate", "prepare"))
    assert trained is not None
    assert evaluated is not None
    assert prepared is not None
    tracking.connect(config)
    client = mlflow.MlflowClient()
    name = config.registered_name
    version = find_version(client, name, output.fingerprint)
    if version is None:
        run_id = tracking.find_run(config, inputs["train"])
        tags = {
            "fingerprint": output.fingerprint,
            "mlflow_run_id": run_id,
            "checkpoint_url": f"{inputs['train'].url}/checkpoint",
            "data_digest": inputs["prepare"].fingerprint,
            "num_parameters": str(trained.counts["num_parameters"]),
            "bits_per_byte": f"{evaluated.counts['bits_per_byte']:.5f}",
            PROBE_TAG: f"{evaluated.counts[PROBE_TAG]:.5f}",
        }
        version = log_version(config, client, inputs["train"], trained, run_id, tags)
    client.set_registered_model_alias(name, config.register.alias, version)
    return output.commit(
        counts={"model_name": name, "version": version, "alias": config.register.alias},
        files={},
    )


def find_version(client: mlflow.MlflowClient, name: str, fingerprint: str) -> str | None:
    """Find the version that an earlier register of the same model made, if the registry still has it."""
    found = client.search_model_versions(f"name = '{name}' and tags.fingerprint = '{fingerprint}'")
    ready = [version for version in found if version.status == "READY" and has_files(client, version)]
    return str(max(int(version.version) for version in ready)) if ready else None


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


def log_version(
    config: Config, client: mlflow.MlflowClient, train: Artifact, trained: Manifest, run_id: str, tags: dict[str, str]
) -> str:
    """Copy the checkpoint into MLflow as a pyfunc model (code and safetensors, no pickle) and register it."""
    name = config.registered_name
    with tempfile.TemporaryDirectory() as folder:
        records = {key: record for key, record in trained.files.items() if key.startswith("checkpoint/")}
        checkpoint = train.download(Path(folder), records) / "checkpoint"
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            # MLflow wishes for type hints and an example, past any filter; hints would override the signature.
            warnings.showwarning = lambda *_, **__: None
            logged = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).parent / "serving" / "pyfunc.py"),
                artifacts={"checkpoint": str(checkpoint)},
                code_paths=[str(Path(str(model.__file__)).parent)],
                signature=SIGNATURE,
                pip_requirements=["torch", "tiktoken", "tokenizers", "safetensors", "numpy"],
                metadata=tags,
            )
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        name, source=logged.model_uri, run_id=run_id, tags=tags, model_id=logged.model_id
    )
    return str(created.version)
