"""Shards hold every document, are the same bytes whoever makes them, and survive any stop."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from model.tokenizer import Tokenizer, load_tokenizer, train_bpe
from pipeline import prepare
from pipeline.artifacts import Artifact, Manifest, artifact_at
from pipeline.config import Config, load_config
from pipeline.corpus.contamination import RUNS
from pipeline.corpus.files import fingerprint_source

WORDS = "the map of an iterable yields results and function argument returns value when object called".split(" ")  # noqa: SIM905
REPOSITORY = Path(__file__).parents[2]


def make_texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [f"Document {n}. " + " ".join(generator.choices(WORDS, k=generator.randint(3, 60))) for n in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tokenizer_in(storage: str) -> tuple[Artifact, Tokenizer]:
    tokenizer = train_bpe([" ".join(WORDS) * 3], 300)
    artifact = artifact_at(storage, "test", "tokenizer", "t" * 20)
    records = {name: artifact.write_text(name, content) for name, content in tokenizer.files().items()}
    artifact.commit({}, records)
    return artifact, tokenizer


def configure(storage: str, *paths: Path, **settings: Any) -> Config:
    listed = ",".join(str(path) for path in paths)
    defaults = {"prepare.shard_tokens": 2000, "prepare.validation_fraction": 0.1, "source.kind": "files"}
    overrides = [f"{key}={value}" for key, value in (defaults | settings).items()]
    return load_config(None, [f"storage={storage}", "name=test", f"source.paths=[{listed}]", *overrides])


def run(config: Config, storage: str, label: str = "p") -> tuple[Artifact, Manifest]:
    output = artifact_at(storage, "test", "prepare", label.ljust(20, "0"))
    source = artifact_at(storage, "test", "source", "s" * 20)
    return output, prepare.run(config, {"source": source, "tokenizer": tokenizer_in(storage)[0]}, output)


def read_texts(output: Artifact, tokenizer: Tokenizer, split: str) -> list[str]:
    texts = []
    for path in sorted(Path(output.path, split).glob("*.parquet")):
        for ids in pq.read_table(path)["tokens"].to_pylist():
            assert ids[-1] == tokenizer.end_of_text
            texts.append(tokenizer.decode(ids[:-1]))
    return texts


def digests(manifest: Manifest) -> dict[str, str]:
    return {name: record.sha256 for name, record in manifest.files.items() if name.endswith(".parquet")}


def test_every_document_lands_in_one_shard_and_comes_back(ray_session: None, tmp_path: Path, storage: str) -> None:
    odd = ["NUL \0", "<|endoftext|> is text", "a\r\nb", "漢字 👩‍👩‍👧", "".join(map(chr, range(0x10000, 0x10400)))]
    texts = [*make_texts(300), *odd, "", "  \n "]
    output, manifest = run(configure(storage, write_jsonl(tmp_path / "x.jsonl", texts)), storage)
    tokenizer = tokenizer_in(storage)[1]
    train, val = (read_texts(output, tokenizer, split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts[:-2])
    assert 10 < len(val) < 60
    counts = manifest.counts
    assert counts["dropped"] == {"empty": 2}
    assert (counts["train"]["documents"], counts["val"]["documents"]) == (len(train), len(val))
    assert counts["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert counts["val"]["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in val)
    assert counts["tokenizer_digest"] == tokenizer.digest
    assert sum(counts["lengths"]) == len(texts) - 2
    assert len([name for name in manifest.files if name.startswith("train/")]) > 3
    # Nothing but the artifact is left, and its files are what the manifest says.
    assert set(output.list_files()) == {*manifest.files, "manifest.json"}
    output.download(tmp_path / "copy")
    metadata = pq.read_metadata(tmp_path / "copy" / min(manifest.files, key=lambda name: (name[:5] != "train", name)))
    assert metadata.metadata[b"tokenizer_digest"].decode() == tokenizer.digest


def test_a_worker_that_tokenizes_does_not_wait_for_torch_to_load() -> None:
    program = "import sys, pipeline.prepare; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"False\n"


def test_the_data_card_shows_how_to_read_a_document(ray_session: None, tmp_path: Path, storage: str) -> None:
    texts = ["only ever the first", *make_texts(100)]
    output, manifest = run(configure(storage, write_jsonl(tmp_path / "x.jsonl", texts)), storage)
    card = output.read_text("README.md")
    assert f"| train | {manifest.counts['train']['documents']:,} |" in card
    assert manifest.files["val/00000.parquet"].sha256 in card
    assert output.read_bytes("histogram.png").startswith(b"\x89PNG")
    program = textwrap.dedent(card.split("```python\n")[1].split("```")[0])
    for name, content in tokenizer_in(storage)[1].files().items():
        Path(output.path, name).write_text(content, encoding="utf-8")
    printed = subprocess.run([sys.executable, "-c", program], cwd=output.path, capture_output=True, text=True)
    assert printed.stdout.removesuffix("\n") in texts


def test_shards_are_the_same_bytes_for_any_number_of_workers(ray_session: None, tmp_path: Path, storage: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", make_texts(300))
    made = [
        digests(run(configure(storage, path, **{"prepare.workers": workers}), storage, f"w{workers}")[1])
        for workers in (1, 2, 4)
    ]
    assert made[0] == made[1] == made[2]


def test_a_compressed_file_is_cut_into_many_tasks(ray_session: None, tmp_path: Path, storage: str) -> None:
    import gzip

    texts = make_texts(400)
    plain = write_jsonl(tmp_path / "x.jsonl", texts)
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes(), compresslevel=1))
    config = configure(storage, packed)
    output, manifest = run(config, storage)
    tokenizer = tokenizer_in(storage)[1]
    assert sorted(read_texts(output, tokenizer, "train") + read_texts(output, tokenizer, "val")) == sorted(texts)
    assert "train/00000-00002-000.parquet" in manifest.files
    assert digests(run(config, storage, "again")[1]) == digests(manifest)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ([], "The corpus is empty"),
        (["", " "], r"The corpus is empty.*2 empty"),
        (["one document alone"], "too small"),
        (["the same", "the same"], "too small"),
    ],
)
def test_a_corpus_with_nothing_to_split_is_an_error(
    ray_session: None, tmp_path: Path, storage: str, texts: list[str], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        run(configure(storage, write_jsonl(tmp_path / "x.jsonl", texts)), storage)
    assert not list(Path(storage).glob("**/prepare-*"))


def test_two_documents_are_enough_for_a_held_out_one(ray_session: None, tmp_path: Path, storage: str) -> None:
    config = configure(storage, write_jsonl(tmp_path / "x.jsonl", ["one text", "another text"]))
    _, manifest = run(config, storage)
    assert [manifest.counts[split]["documents"] for split in ("train", "val")] == [1, 1]


def test_of_two_documents_that_both_hash_into_validation_one_is_trained_on(
    ray_session: None, tmp_path: Path, storage: str
) -> None:
    config = configure(
        storage,
        write_jsonl(tmp_path / "x.jsonl", ["one text", "another text"]),
        **{"prepare.validation_fraction": 0.999999},
    )
    output, manifest = run(config, storage)
    assert [manifest.counts[split]["documents"] for split in ("train", "val")] == [1, 1]
    tokenizer = tokenizer_in(storage)[1]
    assert sorted(read_texts(output, tokenizer, "train") + read_texts(output, tokenizer, "val")) == [
        "another text",
        "one text",
    ]


def test_what_was_lost_is_on_the_screen(
    ray_session: None, tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": text}).encode() for text in make_texts(20)]
    (folder / "x.jsonl").write_bytes(b"\n".join([*lines, b"{broken", b'{"text": "m\xffnded text"}', b""]))
    (folder / "y.pdf").write_bytes(b"%PDF")
    _, manifest = run(configure(storage, folder), storage)
    said = capsys.readouterr()
    lost = "dropped 1: 1 not JSON; 1 kept with characters replaced that are not valid UTF-8"
    assert said.out.splitlines()[-1] == f"prepare   kept 21 of 22 documents; {lost}; files not read: 1 .pdf"
    assert "prepare   WARNING: 9.1% of the documents were lost" in said.err
    assert "prepare   WARNING: 1 of 2 files were not read, because of their endings: 1 .pdf." in said.err
    assert "prepare   WARNING: The validation split has" in said.err
    assert manifest.counts["files_not_read"] == {".pdf": 1}


def test_a_starts_tokenizer_encodes_and_what_it_has_no_tokens_for_is_said(
    ray_session: None, tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.model.tiny_tokenizers import write_tokenizer

    write_tokenizer(tmp_path / "start", "smollm2")
    facts = json.loads((tmp_path / "start/tokenizer.json").read_text())
    del facts["model"]["vocab"][chr(256 + ord("\f"))]
    (tmp_path / "start/tokenizer.json").write_text(json.dumps(facts))
    tokenizer = load_tokenizer(tmp_path / "start")
    artifact = artifact_at(storage, "test", "tokenizer", "u" * 20)
    artifact.commit({}, {name: artifact.write_text(name, text) for name, text in tokenizer.files().items()})
    texts = [f"{text}\fé <|im_end|>" for text in make_texts(20)]
    config = configure(storage, write_jsonl(tmp_path / "x.jsonl", texts))
    output = artifact_at(storage, "test", "prepare", "p" * 20)
    source = artifact_at(storage, "test", "source", "s" * 20)
    manifest = prepare.run(config, {"source": source, "tokenizer": artifact}, output)
    written = [text for split in ("train", "val") for text in read_texts(output, tokenizer, split)]
    assert sorted(written) == sorted(text.replace("\f", "") for text in texts)
    counts = [manifest.counts[split] for split in ("train", "val")]
    assert sum(split["bytes"] for split in counts) == sum(len(text.encode()) for text in written)
    assert sum(split["bytes_without_token"] for split in counts) == 20
    assert "prepare   left out 20 bytes (" in capsys.readouterr().out
    assert "Bytes left out, for which the tokenizer has no tokens: 20." in output.read_text("README.md")
    assert manifest.counts["tokenizer_digest"] == tokenizer.digest


def test_a_source_that_changed_since_it_was_listed_is_not_committed_under_its_fingerprint(
    ray_session: None, tmp_path: Path, storage: str
) -> None:
    config = configure(storage, write_jsonl(tmp_path / "x.jsonl", make_texts(50)))
    fingerprint_source(config.source)
    write_jsonl(tmp_path / "x.jsonl", make_texts(25))
    with pytest.raises(ValueError, match=r"x\.jsonl changed while it was read"):
        run(config, storage)
    assert not list(Path(storage).glob("test/prepare-*/manifest.json"))


def test_the_split_of_a_document_does_not_move(ray_session: None, tmp_path: Path, storage: str) -> None:
    texts = make_texts(200)
    tokenizer = tokenizer_in(storage)[1]
    held_out = []
    for label, listed in (("a", texts), ("b", [*make_texts(50, seed=1), *reversed(texts)])):
        output, _ = run(configure(storage, write_jsonl(tmp_path / f"{label}.jsonl", listed)), storage, label)
        held_out.append(set(read_texts(output, tokenizer, "val")))
    assert held_out[0] <= held_out[1]


def test_a_corpus_that_the_same_hash_has_chosen_is_told_which_fraction_holds_out_what_it_asked_for(
    ray_session: None, tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [text for text in make_texts(2000) if hashlib.sha256(text.encode()).digest()[0] < 64]  # a quarter of them
    shelf = write_jsonl(tmp_path / "shelf.jsonl", texts)
    run(configure(storage, shelf), storage)
    said = " ".join(capsys.readouterr().err.split())
    advised = re.search(r"For 10\.00% set prepare\.validation_fraction=(0\.0\d+)\.", said)
    assert advised is not None, said
    _, manifest = run(configure(storage, shelf, **{"prepare.validation_fraction": advised[1]}), storage, "q")
    assert manifest.counts["val"]["documents"] == pytest.approx(0.1 * len(texts), rel=0.4)


def test_bad_input_is_one_sentence(ray_session: None, tmp_path: Path, storage: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(ValueError, match="has no column 'text'; it has body"):
        run(configure(storage, tmp_path / "x.jsonl"), storage)
    with pytest.raises(ValueError, match="There is no file at"):
        run(configure(storage, tmp_path / "missing.jsonl"), storage)
    (tmp_path / "x.txt").write_bytes(b"bro\xffken")
    with pytest.raises(ValueError, match="is not valid UTF-8"):
        run(configure(storage, tmp_path / "x.txt", **{"source.invalid_text": "fail"}), storage)


def test_dropped_and_mended_documents_are_counted_by_reason(ray_session: None, tmp_path: Path, storage: str) -> None:
    lines = [json.dumps({"text": text}).encode() for text in [*make_texts(50), "short", "long " * 500, ""]]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([*lines, b"{broken", b'{"other": 1}', b'{"text": "m\xffnded text"}']))
    settings = {"prepare.min_characters": 10, "prepare.max_characters": 2000}
    _, manifest = run(configure(storage, tmp_path / "x.jsonl", **settings), storage)
    reasons = {"too short": 1, "too long": 1, "empty": 1, "not JSON": 1, "no text": 1}
    assert manifest.counts["dropped"] == reasons
    assert manifest.counts["replaced_utf8"] == 1
    assert sum(manifest.counts["lengths"]) == 51


def test_duplicates_are_dropped_and_the_first_stays(ray_session: None, tmp_path: Path, storage: str) -> None:
    texts = make_texts(200)
    nearly = [text + " really" for text in texts[:20] if len(text) > 200]
    path = write_jsonl(tmp_path / "x.jsonl", [*texts, *texts[50:80], *nearly, *texts[:5]])
    settings = {"prepare.drop_exact_duplicates": "true", "prepare.drop_near_duplicates": "true"}
    output, manifest = run(configure(storage, path, **settings), storage)
    tokenizer = tokenizer_in(storage)[1]
    kept = read_texts(output, tokenizer, "train") + read_texts(output, tokenizer, "val")
    assert manifest.counts["dropped"]["exact duplicate"] == 35
    assert manifest.counts["dropped"]["near duplicate"] >= len(nearly) - 1 > 3
    assert len(kept) == len(set(kept)) >= 195
    assert set(kept) <= set(texts)
    assert set(output.list_files()) == {*manifest.files, "manifest.json"}


def test_documents_that_hold_what_will_be_asked_are_dropped_and_counted_by_task(
    ray_session: None, tmp_path: Path, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, questions = make_texts(60), make_texts(20, seed=9)
    long = [text for text in questions if len(text.split()) > 15]
    leaking = [f"Somebody wrote: {text.upper()} And so on." for text in long[:5]]
    rows = {
        "asked": [{"context": text, "choices": ["yes", "no"], "gold": 0} for text in long[:3]],
        "told": [{"good": text, "bad": f"No. {text}"} for text in [*long[2:5], "Too short."]],
    }
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    source = write_jsonl(tmp_path / "x.jsonl", [*clean[:30], *leaking, *clean[30:]])
    tasks = f"[{tmp_path}/asked.jsonl,{tmp_path}/told.jsonl]"
    config = configure(storage, source, **{"prepare.decontaminate": tasks})
    output, manifest = run(config, storage)
    tokenizer = tokenizer_in(storage)[1]
    kept = [text for split in ("train", "val") for text in read_texts(output, tokenizer, split)]
    assert sorted(kept) == sorted(clean)
    assert manifest.counts["dropped"] == {"with items of asked": 3, "with items of told": 2}
    assert manifest.counts["decontaminated"] == {
        "asked": {"documents": 3, "items": 3, "short_items": 0},
        "told": {"documents": 2, "items": 4, "short_items": 1},
    }
    said = capsys.readouterr()
    assert "kept 60 of 65 documents; dropped 5: 3 with items of asked, 2 with items of told" in said.out
    assert "2 documents held items of told (4 items)" in said.out
    assert "| told | 2 | 4 | 1 |" in output.read_text("README.md")
    assert not output.exists("work")

    # A stopped run goes on with the same items, and with no others.
    stopped = artifact_at(storage, "test", "prepare", "q".ljust(20, "0"))
    stopped.write_text(RUNS, "those of other items")
    with pytest.raises(ValueError, match=r"The items of asked, told have changed since documents were dropped by them"):
        run(config, storage, "q")
    plain = prepare.settings(configure(storage, source))
    assert "decontaminate" not in plain
    assert prepare.settings(config) == plain | {"decontaminate": config.prepare.decontaminate}


def test_a_long_document_and_a_long_word_go_through(ray_session: None, tmp_path: Path, storage: str) -> None:
    texts = ["word " * 400_000, "x" * 1_000_000, *make_texts(20)]
    output, _ = run(configure(storage, write_jsonl(tmp_path / "x.jsonl", texts)), storage)
    tokenizer = tokenizer_in(storage)[1]
    assert sorted(read_texts(output, tokenizer, "train") + read_texts(output, tokenizer, "val")) == sorted(texts)


DRIVER = """
import sys
import ray
ray.init(address="local", num_cpus=2, log_to_driver=False, configure_logging=False, include_dashboard=False)
sys.path.insert(0, {tests!r})
from test_prepare import configure, run
from pathlib import Path
run(configure({storage!r}, Path({corpus!r})), {storage!r})
print("finished")
"""


def start_driver(storage: str, corpus: Path) -> subprocess.Popen[str]:
    program = DRIVER.format(tests=str(Path(__file__).parent), storage=storage, corpus=str(corpus))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, cwd=REPOSITORY, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def records(storage: str) -> list[Path]:
    return sorted(Path(storage).glob("test/prepare-*/work/*.unit.json"))


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "worker", "ray"])
def test_a_kill_at_any_moment_keeps_what_was_finished(
    ray_session: None, tmp_path: Path, storage: str, victim: str
) -> None:
    import psutil

    corpus = write_jsonl(tmp_path / "x.jsonl", make_texts(30_000))
    expected = digests(run(configure(storage, corpus), storage, "expected")[1])
    stopped = str(tmp_path / "stopped")
    driver = start_driver(stopped, corpus)
    try:
        wait_for(lambda: len(records(stopped)) >= 3 or driver.poll() is not None)
        family = psutil.Process(driver.pid).children(recursive=True)
        if victim == "driver":
            driver.kill()
        else:
            # A worker is called after its task; Ray's own agents are not, and with one of them the whole node goes.
            names = ("ray::MapBatches", "ray::IDLE") if victim == "worker" else ("raylet",)
            found = [each for each in family if each.name().startswith(names) or each.cmdline()[0].startswith(names)]
            os.kill(found[0].pid, signal.SIGKILL)
        if victim == "worker":
            assert driver.wait(timeout=280) == 0, driver.stderr and driver.stderr.read()
        else:
            driver.wait(timeout=280)
            finished = {path.name: path.stat().st_mtime_ns for path in records(stopped)}
            assert len(finished) >= 3
            made = Path(stopped).glob("test/prepare-*/train/*.parquet")
            before = {path.name: path.stat().st_mtime_ns for path in made}
            output, manifest = run(configure(stopped, corpus), stopped)
            assert digests(manifest) == expected
            kept = [
                name
                for name, changed in before.items()
                if Path(output.path, "train", name).stat().st_mtime_ns == changed
            ]
            assert len(kept) >= len(finished) - 1
            return
        manifest_text = next(Path(stopped).glob("test/prepare-*/manifest.json")).read_text()
        assert digests(Manifest.from_json(manifest_text, "")) == expected
    finally:
        for process in [*psutil.Process(driver.pid).children(recursive=True)] if driver.poll() is None else family:
            if process.is_running():
                process.kill()
        if driver.poll() is None:
            driver.kill()
        driver.wait()


def test_a_full_disk_is_a_clear_message_and_the_next_run_ends_the_same(
    ray_session: None, tmp_path: Path, storage: str
) -> None:
    corpus = write_jsonl(tmp_path / "x.jsonl", make_texts(300))
    expected = digests(run(configure(storage, corpus), storage, "expected")[1])
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        with pytest.raises(ValueError, match=r"No space left on device.*run again to go on"):
            run(configure(str(small), corpus), str(small))
        subprocess.run(["mount", "-o", "remount,size=32m", str(small)], check=True)
        assert digests(run(configure(str(small), corpus), str(small))[1]) == expected
    finally:
        # Lazily: a worker of Ray may still look at the folder.
        subprocess.run(["umount", "--lazy", str(small)], check=True)
