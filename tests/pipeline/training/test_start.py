"""What a start decides of the settings, what is refused before Ray starts, and what a name goes on meaning."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from model.checkpoint import read_weights, weight_files
from model.tokenizer import Tokenizer
from pipeline import orchestrator
from pipeline.config import Config, load_config, to_yaml
from pipeline.training import origins
from pipeline.training.start import fetch_start, load_started_config, read_notes, store_start
from tests.pipeline.tiny_registry import TinyRegistry, make_registry, tiny_tokenizer
from tests.pipeline.tiny_start import PADDING, write_start
from tests.s3_server import s3_server

# What must be said with contexts so short.
SHORT = ("train.batch_tokens=512", "train.sample_tokens=4", "evaluate.sample_tokens=4")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def gpt2(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("starts") / "gpt2", "gpt2", tokenizer)


@pytest.fixture(scope="module")
def qwen3(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("starts") / "qwen3", "qwen3", tokenizer)


def started(start: Path | str, storage: Path | str, *settings: str) -> Config:
    return load_started_config(None, [f"start.model={start}", f"storage={storage}", "name=tiny", *SHORT, *settings])


def artifact(config: Config) -> Any:
    return orchestrator.locate(config)["start"]


def test_the_models_settings_come_from_its_folder(gpt2: Path, qwen3: Path, tokenizer: Tokenizer, tmp_path: Path):
    classic = started(gpt2, tmp_path)
    assert (classic.model.family, classic.model.num_layers, classic.model.width) == ("classic", 2, 48)
    assert (classic.model.context_length, classic.model.tie_embeddings, classic.model.dropout) == (64, True, 0.1)
    modern = started(qwen3, tmp_path)
    assert (modern.model.family, modern.model.kv_heads, modern.model.channels_per_head) == ("modern", 2, 16)
    for config in (classic, modern):
        assert config.tokenizer.kind == "start"
        assert config.tokenizer.most_tokens == tokenizer.vocab_size + PADDING


def test_a_resolved_config_reads_back_as_itself(gpt2: Path, tmp_path: Path):
    config = started(gpt2, tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_started_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model.num_layers=3", "model.num_layers=3 contradicts start.model="),
        ("model.family=modern", "model.family=modern contradicts start.model="),
        ("model.mlp_width=64", "whose config.json says 192; leave model.mlp_width out"),
        ("model.tie_embeddings=false", "model.tie_embeddings=False contradicts"),
        ("model.context_length=128", "A context of 128 tokens is more than start.model="),
        ("tokenizer.kind=bpe", "whose weights learnt with another tokenizer; set tokenizer.kind=start"),
        ("tokenizer.kind=gpt2", "whose weights learnt with another tokenizer; set tokenizer.kind=start"),
        ("tokenizer.vocabulary_size=999", "tokenizer.vocabulary_size=999 contradicts"),
        ("start.digest=0123", "holds other files than start.digest=0123 says"),
    ],
)
def test_a_setting_that_contradicts_is_one_sentence_that_names_both(
    setting: str, sentence: str, gpt2: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=r".") as caught:
        started(gpt2, tmp_path, setting)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "setting", ["model.num_layers=2", "model.mlp_width=192", "model.mlp_width=0", "model.norm_epsilon=1e-5"]
)
def test_a_setting_that_says_the_same_is_none(setting: str, gpt2: Path, tmp_path: Path):
    assert started(gpt2, tmp_path, setting).model == started(gpt2, tmp_path).model


def test_llamas_settings_are_read_and_can_be_said_again(tokenizer: Tokenizer, tmp_path: Path):
    folder = write_start(tmp_path / "llama", "llama3", tokenizer)
    config = started(folder, tmp_path, "model.qk_norm=false", "model.rope_scaling=llama3", "model.norm_epsilon=1e-5")
    assert (config.model.rope_factor, config.model.rope_original_context) == (8.0, 32)
    with pytest.raises(ValueError, match=r"model.rope_factor=4.0 contradicts .* config.json says 8.0"):
        started(folder, tmp_path, "model.rope_factor=4")


def test_gpt2s_context_can_be_cropped_and_ropes_lengthened(gpt2: Path, qwen3: Path, tmp_path: Path):
    assert started(gpt2, tmp_path, "model.context_length=32").model.context_length == 32
    assert started(qwen3, tmp_path, "model.context_length=256").model.context_length == 256


def spoil_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def empty(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json; name a Hugging Face folder"),
        (lambda folder: shutil.rmtree(folder), "is not there; name a Hugging Face folder"),
        (empty, "is not JSON"),
        (lambda folder: spoil_config(folder, model_type="mamba"), "mamba"),
        (lambda folder: spoil_config(folder, n_layer=3), "lacks the weight transformer.h.2.ln_1.weight"),
        (lambda folder: spoil_config(folder, vocab_size=9), "they do not belong together"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "is damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_sentence(spoil: Any, sentence: str, gpt2: Path, tmp_path: Path):
    folder = tmp_path / "start"
    shutil.copytree(gpt2, folder)
    spoil(folder)
    with pytest.raises(ValueError, match=r".") as caught:
        started(folder, tmp_path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "For a model of the hub write hf://HuggingFaceTB/SmolLM2-135M."),
        ("hf://a b", "write hf://owner/name"),
        ("models:/x", "write models:/name@alias or models:/name/version"),
        ("gs://bucket/x", "it can be a folder, local or s3://"),
        ("models:/nobody@champion", "is a version of 'nobody', and there is no registry at sqlite:///"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence(name: str, sentence: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r".") as caught:
        started(name, tmp_path)
    assert sentence in str(caught.value)


def test_the_tokenizer_of_a_start_needs_one(tmp_path: Path):
    with pytest.raises(ValueError, match=r"tokenizer.kind=start is the tokenizer of start.model, which is empty"):
        load_config(None, ["tokenizer.kind=start"])


def test_a_start_without_a_tokenizer_needs_its_name(tmp_path: Path):
    folder = write_start(tmp_path / "bare", "gpt2", None)
    with pytest.raises(ValueError, match=r"holds no tokenizer.json; add it, or name the tokenizer"):
        started(folder, tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.kind=gpt2 has 50,257 tokens, more than the 300"):
        started(folder, tmp_path, "tokenizer.kind=gpt2")


def test_the_digest_is_in_the_fingerprints_of_what_reads_the_start(gpt2: Path, tokenizer: Tokenizer, tmp_path: Path):
    one = orchestrator.locate(started(gpt2, tmp_path))
    assert one == orchestrator.locate(started(gpt2, tmp_path, "model.num_layers=2")), "a name for it changes nothing"
    shutil.copytree(gpt2, tmp_path / "elsewhere")
    assert one == orchestrator.locate(started(tmp_path / "elsewhere", tmp_path)), "nor does the place where it lies"
    other = orchestrator.locate(
        started(write_start(tmp_path / "other", "gpt2", tokenizer, layer_norm_epsilon=1e-4), tmp_path)
    )
    for stage in orchestrator.STAGES:
        assert one[stage] != other[stage], stage


def test_a_folder_that_changes_is_told(gpt2: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: Any):
    folder = tmp_path / "start"
    shutil.copytree(gpt2, folder)
    before = started(folder, tmp_path)
    store_start(before, artifact(before))
    assert started(folder, tmp_path) == before
    capsys.readouterr()
    shutil.rmtree(folder)
    write_start(folder, "gpt2", tokenizer, layer_norm_epsilon=1e-4)
    after = started(folder, tmp_path)
    assert after.start.digest != before.start.digest
    assert f"digest {before.start.digest}, now {after.start.digest}" in capsys.readouterr().out
    shutil.rmtree(folder)
    assert started(folder, tmp_path) == before, "its copy is used when it has gone"
    assert "cannot be read now; its copy at" in capsys.readouterr().out


def test_a_changed_start_is_never_copied_under_the_old_digest(gpt2: Path, tokenizer: Tokenizer, tmp_path: Path):
    folder = tmp_path / "start"
    shutil.copytree(gpt2, folder)
    config = started(folder, tmp_path)
    write_start(folder, "gpt2", tokenizer, layer_norm_epsilon=1e-4)
    with pytest.raises(ValueError, match="has changed while it was read"):
        store_start(config, artifact(config))
    assert not artifact(config).is_done


def test_weights_in_several_files_are_those_that_their_index_lists(qwen3: Path, tmp_path: Path):
    folder = tmp_path / "start"
    shutil.copytree(qwen3, folder)
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    stale = next(folder.glob("model-*.safetensors"))
    shutil.copy(stale, folder / "model-00099-of-00099.safetensors")
    config = started(folder, tmp_path)
    store_start(config, artifact(config))
    copied = fetch_start(artifact(config), tmp_path / "unused", weights=True)
    assert read_weights(copied).keys() == read_weights(folder).keys()
    assert copied / "model-00099-of-00099.safetensors" not in weight_files(copied)
    assert len(weight_files(copied)) > 1


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> TinyRegistry:
    found = make_registry(tmp_path_factory.mktemp("registry"))
    found.add_version(seed=1, alias="champion")
    return found


def test_an_alias_that_moves_does_not_move_what_began_with_it(
    registry: TinyRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    with pytest.raises(ValueError, match="The registry has no model 'nobody'"):
        started("models:/nobody@champion", tmp_path)
    config = started("models:/tiny@champion", tmp_path)
    assert config.start.resolved == "models:/tiny/1"
    manifest = store_start(config, artifact(config))
    assert manifest.counts["run_id"]
    registry.add_version(seed=2, alias="champion")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)  # making a version has forgotten it
    capsys.readouterr()
    assert started("models:/tiny@champion", tmp_path) == config
    said = capsys.readouterr().out
    assert "means models:/tiny/2 by now" in said
    assert "goes on with it" in said
    other = started("models:/tiny@champion", tmp_path, "name=another")
    assert other.start.resolved == "models:/tiny/2"
    assert other.start.digest != config.start.digest


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import boto3

    with s3_server() as environment:
        boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"]).create_bucket(Bucket="bucket")
        yield


def test_a_start_on_s3_is_the_same_start(gpt2: Path, tmp_path: Path, s3: None):
    filesystem, path = origins.filesystem_of("s3://bucket/starts/gpt2")
    for file in gpt2.iterdir():
        filesystem.put_file(str(file), f"{path}/{file.name}")
    config = started("s3://bucket/starts/gpt2", "s3://bucket/run")
    assert config.start.digest == started(gpt2, tmp_path).start.digest
    store_start(config, artifact(config))
    fetched = fetch_start(artifact(config), tmp_path / "fetched", weights=True)
    assert (fetched / "model.safetensors").read_bytes() == (gpt2 / "model.safetensors").read_bytes()
    assert read_notes(config)["s3://bucket/starts/gpt2"]["digest"] == config.start.digest
    with pytest.raises(ValueError, match="is not there; name a Hugging Face folder"):
        started("s3://bucket/starts/nothing", tmp_path)
    with pytest.raises(ValueError, match="is not there; name a Hugging Face folder"):
        started("s3://nobucket/x", tmp_path)


class Hub:
    """What `huggingface_hub` offers of one repository, whose main branch moves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commit, self.downloads = folder, "a" * 40, []

    def model_info(self, repository: str, revision: str, files_metadata: bool) -> Any:
        from types import SimpleNamespace

        siblings = [
            SimpleNamespace(
                rfilename=path.name,
                lfs=SimpleNamespace(sha256=origins.record_file(path).sha256) if "safetensors" in path.name else None,
            )
            for path in self.folder.iterdir()
        ]
        return SimpleNamespace(sha=self.commit if revision == "main" else revision, siblings=siblings)

    def snapshot_download(self, repository: str, revision: str, allow_patterns: list[str], **_: Any) -> str:
        self.downloads += [revision, *allow_patterns]
        return str(self.folder)


def test_a_repository_of_the_hub_is_pinned_to_its_commit(gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub(gpt2)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    config = started("hf://someone/gpt2", tmp_path)
    assert config.start.resolved == f"hf://someone/gpt2@{'a' * 40}"
    assert config.start.digest == started(gpt2, tmp_path).start.digest, "the same files anywhere"
    assert "model.safetensors" not in hub.downloads, "the hub knows its digest"
    store_start(config, artifact(config))
    assert "model.safetensors" in hub.downloads
    hub.commit = "b" * 40
    assert started("hf://someone/gpt2", tmp_path) == config, "what began goes on with its commit"
    assert started("hf://someone/gpt2", tmp_path, "name=new").start.resolved.endswith("b" * 40)


def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(ValueError, match=r"The hub has no answer for 'someone/nothing' at 'main'") as caught:
        started("hf://someone/nothing", tmp_path)
    assert "hf_secret" not in str(caught.value)
