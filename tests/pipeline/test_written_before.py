"""What earlier code wrote is still read: fingerprints, shards, a tokenizer, and a checkpoint to go on from.

`written_before/` was written by the code of 2026-11-26: a whole pipeline of `SETTINGS`, of which the training is kept
as it was after step 4, so that going on from it is what a user does who updates in the middle of a run.
"""

import shutil
from pathlib import Path

import pytest

from pipeline import orchestrator
from pipeline.config import Config, load_config

BEFORE = Path(__file__).with_name("written_before")
SOURCE = "401a9f15abfccc9d2b87"
SETTINGS = (
    "name=before",
    "seed=7",
    "source.kind=files",
    "source.paths=[stories.jsonl]",
    "tokenizer.vocabulary_size=264",
    "prepare.validation_fraction=0.1",
    "prepare.shard_tokens=3000",
    "model.num_layers=1",
    "model.width=16",
    "model.mlp_width=16",
    "model.num_heads=2",
    "model.context_length=32",
    "train.steps=8",
    "train.batch_tokens=128",
    "train.micro_batch_sequences=2",
    "train.evaluate_every_steps=4",
    "train.evaluation_tokens=512",
    "train.checkpoint_every_steps=4",
    "train.log_every_steps=1",
    "train.sample_tokens=4",
    "train.threads_per_worker=1",
    "train.precision=float32",
    "train.num_workers=1",
    "train.run=first",
    "evaluate.max_tokens=512",
    "evaluate.sample_tokens=8",
)
# Each stage's fingerprint for each preset, from a source of twenty zeros. A change here makes everybody's finished
# work invisible to their next run.
FINGERPRINTS = {
    "demo": (
        "e3eaf34d315956dbe374",
        "b11ce3de6802092b81e2",
        "7d64a17f81c2acdbbcd9",
        "8a9d406cd034d74110e7",
        "d40b2d1d02acd0a546d6",
    ),
    "gpt-53m-char": (
        "d96b7b42deaaddfdf90a",
        "936736c2029a70064f08",
        "48acb1690a1abc8886c0",
        "14e006fe06ef65312d79",
        "e841b673c56ade95d26b",
    ),
    "gpt-53m": (
        "032f9d2a7d472b687865",
        "59867a472e55cefeccb9",
        "b73a38ba25e9ec432284",
        "ac64e7427e2e023aeecd",
        "fda92cd5dad5ef7101fa",
    ),
    "gpt2-124m": (
        "afe25a58413f08a07c51",
        "2134dfd4c8eb3089fbf8",
        "0975af0e8e720f5fa32e",
        "13664a44344a28a7c2bf",
        "70cb0dc854b24b3629ba",
    ),
    "speedrun": (
        "032f9d2a7d472b687865",
        "59867a472e55cefeccb9",
        "cdec2b2f6881a7fe38bb",
        "834d7228d986b64d5429",
        "594ce9a4833981be780c",
    ),
}
# Recipes that were made better since: as they were, they find what they made.
THEN = {
    "demo": (
        *("train.steps=170", "train.evaluate_every_steps=50", "train.evaluation_tokens=65536"),
        *("optimizer.muon_learning_rate=0.02", "optimizer.embedding_learning_rate=0.2"),
        "tokenizer.pattern=gpt4",
    )
}


@pytest.fixture
def old_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the source be the one that the old artifacts were made from: its path and time are not this machine's."""
    monkeypatch.setattr(orchestrator, "fingerprint_source", lambda source: SOURCE)


@pytest.fixture
def config(tmp_path: Path, old_source: None) -> Config:
    shutil.copytree(BEFORE, tmp_path / "before")
    return load_config(None, [f"storage={tmp_path}", *SETTINGS])


@pytest.mark.parametrize("preset", FINGERPRINTS)
def test_a_preset_finds_what_it_made_before(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator, "fingerprint_source", lambda source: "0" * 20)
    found = orchestrator.locate(load_config(f"jobs/presets/{preset}.yaml", THEN.get(preset, ())))
    assert tuple(found[stage].fingerprint for stage in orchestrator.STAGES) == FINGERPRINTS[preset]


def test_a_training_goes_on_from_the_old_checkpoint_on_the_old_shards(config: Config, ray_session: None) -> None:
    lines: list[str] = []
    manifests = orchestrator.run(config, report=lines.append)
    assert [line.split()[0] for line in lines if "done already" in line] == ["tokenizer", "prepare"]
    trained = manifests["train"].counts
    # What the old code came to with steps 5 to 8; another processor may round otherwise.
    assert trained["bits_per_byte"] == pytest.approx(6.159826, rel=1e-4)
    assert trained["restarts"] == 1, "it did not begin anew"
    assert manifests["evaluate"].counts["bits_per_byte"] == pytest.approx(6.159826, rel=1e-4)
    assert manifests["evaluate"].counts["probe_text_bits_per_byte"] == pytest.approx(6.965153, rel=1e-4)
    assert [manifests[stage].fingerprint for stage in ("evaluate", "register")] == [
        "de4615dc3d30bcf2072f",
        "db2b00bd8306c79d3b36",
    ]
