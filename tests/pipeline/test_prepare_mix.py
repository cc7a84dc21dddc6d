"""Each source of a mix is prepared as it would be alone; the mix says which they are, and a training reads them all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from model.chat import TEMPLATE_FILE
from model.tokenizer import load_tokenizer
from pipeline import orchestrator, prepare
from pipeline.artifacts import Artifact
from pipeline.config import Config, load_config
from pipeline.corpus.documents import read_documents
from pipeline.corpus.members import members_of
from pipeline.training.plan import plan_training
from pipeline.training.worker import open_stream
from tests.mlflow_store import point_mlflow_at
from tests.pipeline.test_prepare import make_texts, write_jsonl
from tests.pipeline.test_prepare_conversations import talk


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("mix")
    write_jsonl(folder / "old texts.jsonl", make_texts(120))
    write_jsonl(folder / "new.jsonl", make_texts(60, seed=1))
    rows = [{"messages": talk(number)} for number in range(80)]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mix = [f"'6 conversations {folder}/talks.jsonl'", f"""'1 files "{folder}/old texts.jsonl" name=base'"""]
    settings = (
        *("source.kind=mix", f"source.mix=[{','.join(mix)}]", "tokenizer.vocabulary_size=300", "name=test"),
        *("prepare.shard_tokens=2000", "prepare.validation_fraction=0.1", "model.context_length=128"),
        *("train.batch_tokens=1024", "train.steps=50", f"storage={folder}/storage"),
    )
    return load_config(None, settings)


@pytest.fixture(scope="module")
def artifacts(config: Config, ray_session: None) -> dict[str, Artifact]:
    point_mlflow_at(f"sqlite:///{config.storage}/mlflow.db")
    for stage in ("tokenizer", "prepare"):
        orchestrator.run(config, only=stage)
    return orchestrator.locate(config)


def test_a_mix_is_its_sources_and_its_card_says_their_shares_and_epochs(
    config: Config, artifacts: dict[str, Artifact]
) -> None:
    chat, base = members_of(artifacts["prepare"])
    assert [(each.name, round(each.share, 4)) for each in (chat, base)] == [("talks", 0.8571), ("base", 0.1429)]
    counts, of_chat, of_base = (each.manifest().counts for each in (artifacts["prepare"], chat.shards, base.shards))
    for split in ("train", "val"):
        assert counts[split]["tokens"] == of_chat[split]["tokens"] + of_base[split]["tokens"]
        assert counts[split]["learnt_tokens"] == of_chat[split]["learnt_tokens"]
    assert of_chat["train"]["documents"] + of_chat["val"]["documents"] == 80
    page = artifacts["prepare"].read_text("README.md")
    epochs = 50 * 1024 / 7 / of_base["train"]["tokens"]
    assert f"| base | 14.29% | {of_base['train']['documents']:,} |" in page
    assert f"| {epochs:.2f} | prepare-{base.shards.fingerprint} |" in page
    assert artifacts["prepare"].exists(TEMPLATE_FILE)
    tokenizer = load_tokenizer(Path(artifacts["tokenizer"].path))
    texts = read_documents(artifacts["prepare"], tokenizer, 1000)
    assert len(texts) == counts["val"]["documents"]
    plan = plan_training(config, artifacts, artifacts["train"], tracking_uri="", mlflow_run_id="", started=0)
    assert plan.chat_template
    stream = open_stream(plan, pin_memory=False)
    assert stream.batch(3).tokens.shape == (8, 128)
    stream.close()


def test_what_a_source_alone_would_make_is_made_once(
    config: Config, artifacts: dict[str, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    written = {each.shards.url: each.shards.manifest().created for each in members_of(artifacts["prepare"])}
    chat, base = config.source.mix
    others = replace(config, source=replace(config.source, mix=[chat.replace("6", "2", 1), base]))
    assert orchestrator.locate(others)["prepare"] != artifacts["prepare"]
    orchestrator.run(others, only="prepare")
    assert "talks: 66.67% of the tokens, read" in capsys.readouterr().out
    again = members_of(orchestrator.locate(others)["prepare"])
    assert {each.shards.url: each.shards.manifest().created for each in again} == written
    (alone, _) = prepare.parts(config, artifacts)
    assert Path(alone.url).is_dir()


def test_a_mix_that_lost_a_source_is_made_again(config: Config, artifacts: dict[str, Artifact]) -> None:
    [_, base] = members_of(artifacts["prepare"])
    files = base.shards.manifest().files
    shutil.rmtree(base.shards.path)
    orchestrator.run(config, only="prepare")
    assert members_of(artifacts["prepare"])[1].shards.manifest().files == files
    damaged = Path(base.shards.file("train/00000-000.parquet"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    orchestrator.run(config, only="prepare", first="prepare")
    assert members_of(artifacts["prepare"])[1].shards.manifest().files == files
    assert damaged.read_bytes()[:4] == b"PAR1"


def test_a_source_without_text_is_named(config: Config, artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    mix = [*config.source.mix, f"1 files {tmp_path}/empty.jsonl"]
    broken = replace(config, source=replace(config.source, mix=mix))
    with pytest.raises(ValueError, match=r"^empty, in source.mix: The corpus is empty"):
        prepare.run(broken, artifacts, Artifact(str(tmp_path / "out"), "prepare", "0" * 20))
