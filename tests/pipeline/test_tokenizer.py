import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.tokenizer import load_tokenizer
from pipeline import tokenizer
from pipeline.artifacts import Artifact, artifact_at
from pipeline.config import Config, load_config

TEXTS = ["The fox counted the stars.", "Les étoiles, comptées — une à une. 🌙", "the the the"]


def run(storage: str, folder: Path, *settings: str) -> Artifact:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 30), encoding="utf-8")
    config: Config = load_config(None, [f"storage={storage}", "source.kind=files", f"source.paths=[{path}]", *settings])
    source = artifact_at(storage, config.name, "source", "0" * 20)
    output = artifact_at(storage, config.name, "tokenizer", "1" * 20)
    tokenizer.run(config, {"source": source}, output)
    return output


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_the_stage_leaves_a_tokenizer_that_gives_every_text_back(ray_session, storage, tmp_path, kind):
    output = run(storage, tmp_path, f"tokenizer.kind={kind}", "tokenizer.vocabulary_size=300")
    made = load_tokenizer(output.download(tmp_path / "copy"))
    assert made.vocab_size <= 300
    assert all(made.decode(made.encode(text)) == text for text in [*TEXTS, "never seen: Ж"])


def test_the_same_corpus_gives_the_same_vocabulary(ray_session, tmp_path):
    settings = ("tokenizer.kind=bpe", "tokenizer.vocabulary_size=300")
    first, second = (run(str(tmp_path / name), tmp_path, *settings).read_text("tokenizer.json") for name in "ab")
    assert first == second


def test_a_trained_vocabulary_is_shorter_than_bytes(ray_session, storage, tmp_path):
    output = run(storage, tmp_path, "tokenizer.kind=bpe", "tokenizer.vocabulary_size=300")
    made = load_tokenizer(output.download(tmp_path / "copy"))
    ids = made.encode(TEXTS[0])
    assert len(ids) < len(TEXTS[0].encode())
    assert int(np.asarray(made.byte_lengths)[ids].sum()) == len(TEXTS[0].encode())


def test_the_stage_says_what_of_the_sample_was_lost(ray_session, storage, tmp_path, capsys):
    (tmp_path / "notes.docx").write_bytes(b"PK")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": null}\n{broken\n')
    config = load_config(None, [f"storage={storage}", "source.kind=files", f"source.paths=[{tmp_path}]"])
    output = artifact_at(storage, config.name, "tokenizer", "1" * 20)
    tokenizer.run(config, {"source": artifact_at(storage, config.name, "source", "0" * 20)}, output)
    said = capsys.readouterr()
    assert "of 3 documents in the sample: dropped 2: 1 no text, 1 not JSON; files not read: 1 .docx" in said.out
    assert "tokenizer WARNING: 66.7% of the documents were lost" in said.err


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_an_empty_corpus_is_told_with_its_reasons(ray_session, storage, tmp_path, kind):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{broken\n')
    config = load_config(
        None, [f"storage={storage}", "source.kind=files", f"source.paths=[{tmp_path}]", f"tokenizer.kind={kind}"]
    )
    source = artifact_at(storage, config.name, "source", "0" * 20)
    with pytest.raises(ValueError, match=r"The corpus is empty.*\(dropped 2: 1 empty, 1 not JSON\)"):
        tokenizer.run(config, {"source": source}, artifact_at(storage, config.name, "tokenizer", "1" * 20))


def test_a_parquet_file_without_rows_is_an_empty_corpus(ray_session, storage, tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "x.parquet")
    config = load_config(None, [f"storage={storage}", "source.kind=files", f"source.paths=[{tmp_path}]"])
    source = artifact_at(storage, config.name, "source", "0" * 20)
    with pytest.raises(ValueError, match="The corpus is empty"):
        tokenizer.run(config, {"source": source}, artifact_at(storage, config.name, "tokenizer", "1" * 20))
