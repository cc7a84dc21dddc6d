"""What lies where: every path finds the same files however it is written, and nothing is passed over in silence."""

import os
import shutil
import time
from pathlib import Path

import pytest

from pipeline.config import FORMAT_OF_ENDING, SourceConfig
from pipeline.corpus.endings import File
from pipeline.corpus.files import Listing, find_files, fingerprint_source, listing_of, slices
from tests.pipeline.corpus.tiny_corpus import documents, files, jsonl


def names(*paths: Path | str) -> list[str]:
    return [file.name for file in find_files(SourceConfig(kind="files", paths=[str(path) for path in paths])).files]


def write(folder: Path, *names_below: str) -> Path:
    for name in names_below:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_relative_folder_is_read_as_the_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "corpus", "a.txt", "deep/b.txt")
    monkeypatch.chdir(tmp_path)
    for path in ("corpus", "./corpus/", "corpus/../corpus", "corpus/*"):
        assert "a.txt" in names(path)
    source, absolute = files(Path("corpus")), files(tmp_path / "corpus")
    assert fingerprint_source(source) == fingerprint_source(absolute)
    assert documents(source) == documents(absolute) == ["a.txt", "deep/b.txt"]
    monkeypatch.chdir("/")
    assert documents(absolute) == ["a.txt", "deep/b.txt"]


def test_hidden_folders_are_left_out_however_the_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c", "a.txt", ".git/b.txt", "deep/_temporary/c.txt", "deep/d.txt", ".e.txt", "_SUCCESS.txt")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "c", "c", "c/**", "c/**/*.txt", f"{tmp_path}/c/**/*.txt", "*/**/*.txt"):
        assert names(path) == ["a.txt", "d.txt"], path
    assert names("c/.git/*.txt", "c/deep/_*/*.txt", "c/_SUCCESS.txt") == ["b.txt", "_SUCCESS.txt", "c.txt"]


def test_a_hidden_folder_that_is_named_is_meant(tmp_path: Path) -> None:
    write(tmp_path / ".cache/x", "a.txt", ".b/c.txt")
    assert names(tmp_path / ".cache") == names(tmp_path / ".cache" / "*" / "*.txt") == ["a.txt"]


def test_brackets_in_a_name_are_a_name_before_they_are_a_pattern(tmp_path: Path) -> None:
    write(tmp_path, "[en] books/a.txt", "page[1].txt", "page1.txt", "[en] books/b[2].txt")
    assert names(tmp_path / "page[1].txt") == ["page[1].txt"]
    assert names(tmp_path / "[en] books") == ["a.txt", "b[2].txt"]
    assert names(tmp_path / "[en] books" / "*.txt") == ["a.txt", "b[2].txt"]
    (tmp_path / "page[1].txt").unlink()
    assert names(tmp_path / "page[1].txt") == ["page1.txt"]


def hugging_face_cache(folder: Path) -> Path:
    blobs, snapshot = folder / "blobs", folder / "snapshots" / ("a" * 40)
    for directory in (blobs, snapshot / "data"):
        directory.mkdir(parents=True)
    for number, name in enumerate(("data/x.jsonl", "data/y.txt", "dataset.bin")):
        (blobs / f"{number:040d}").write_bytes(jsonl(["from a blob"]) if name.endswith(".jsonl") else b"text")
        depth = "../" * (name.count("/") + 2)
        (snapshot / name).symlink_to(f"{depth}blobs/{number:040d}")
    return snapshot


def test_a_hugging_face_cache_is_read_by_the_names_of_its_links(tmp_path: Path) -> None:
    snapshot = hugging_face_cache(tmp_path)
    assert documents(files(snapshot)) == ["from a blob", "text"]
    assert documents(files(snapshot / "data" / "x.jsonl")) == ["from a blob"]
    assert documents(files(snapshot / "data" / "*.jsonl")) == ["from a blob"]
    assert find_files(files(snapshot)).ignored == {".bin": 1}
    whole = find_files(files(tmp_path))  # blobs that are read through a link are not told as unread
    assert [file.name for file in whole.files] == ["x.jsonl", "y.txt"]
    assert sum(whole.ignored.values()) == 1


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "real", "a.txt", "deep/b.txt")
    corpus = write(tmp_path / "corpus", "c.txt")
    (corpus / "first").symlink_to(tmp_path / "real")
    (corpus / "second").symlink_to(tmp_path / "real")
    (corpus / "again.txt").symlink_to(corpus / "c.txt")
    assert sorted(names(corpus)) == sorted(names(corpus / "**")) == ["a.txt", "b.txt", "c.txt"]


def test_a_link_in_a_circle_or_to_nothing_is_a_sentence(tmp_path: Path) -> None:
    corpus = write(tmp_path / "corpus", "deep/a.txt")
    (corpus / "deep" / "up").symlink_to(corpus)
    for path in (corpus, corpus / "**"):
        with pytest.raises(ValueError, match=r"deep/up is a link back to .*corpus, which it lies in"):
            names(path)
    (corpus / "deep" / "up").unlink()
    (corpus / "b.txt").symlink_to("nowhere.txt")
    with pytest.raises(ValueError, match=r"b\.txt is a link to nowhere\.txt, which cannot be followed"):
        names(corpus)
    (corpus / "b.txt").unlink()
    (corpus / "b.txt").symlink_to("b.txt")
    with pytest.raises(ValueError, match=r"b\.txt is a link to b\.txt, which cannot be followed"):
        names(corpus)


def test_files_with_other_endings_are_counted_and_named(tmp_path: Path) -> None:
    write(tmp_path / "c", "a.txt", "notes.md", "b.PDF", "c.pdf", "d.csv.gz", "e.html", "f.wat.gz", "README")
    listing = find_files(files(tmp_path / "c"))
    assert [file.name for file in listing.files] == ["a.txt", "notes.md"]
    assert listing.ignored == {".pdf": 2, ".csv.gz": 1, ".html": 1, ".wat.gz": 1, "without an ending": 1}
    shutil.move(tmp_path / "c" / "b.PDF", tmp_path / "b.PDF")
    with pytest.raises(ValueError, match=r"b\.PDF cannot be read: \.pdf is not among \.txt, .*\.gz"):
        names(tmp_path / "b.PDF")
    with pytest.raises(ValueError, match=r"README cannot be read: its name has no ending; give it one of \.txt, "):
        names(tmp_path / "c" / "README")
    for name in ("a.txt", "notes.md"):
        (tmp_path / "c" / name).unlink()
    with pytest.raises(ValueError, match=r"no text file at .*; it holds 1 \.csv\.gz, 1 \.html, 1 \.pdf"):
        names(tmp_path / "c")


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("~nosuchuser/corpus", "'~nosuchuser/corpus' names the home folder of a user"),
        ("/nowhere/at/all", "There is no file at"),
    ],
)
def test_a_path_that_leads_nowhere_is_a_sentence(path: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        names(path)


def test_an_empty_path_is_refused_before_anything_is_read() -> None:
    for paths in ([""], ["corpus", " "]):
        with pytest.raises(ValueError, match="holds an empty path"):
            SourceConfig(kind="files", paths=paths)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "secret/b.txt")
    (tmp_path / "secret").chmod(0)
    with pytest.raises(ValueError, match="may not be read"):
        names(tmp_path)


def test_a_hundred_thousand_files_are_cut_in_seconds() -> None:
    found = Listing(tuple(File(f"/corpus/{number:06d}.txt", 300, "1.0") for number in range(100_000)))
    began = time.process_time()
    cut = slices(files(Path("/corpus")), 30_000_000, found)
    assert time.process_time() - began < 10  # the square of a group would take hours
    assert [len(slice_.files) for slice_ in cut] == [100_000]
    assert len(slices(files(Path("/corpus")), 3000, found)) == 10_000


def test_stages_read_the_listing_that_the_fingerprint_was_made_of(tmp_path: Path) -> None:
    source = files(write(tmp_path, "a.txt"))
    fingerprint_source(source)
    write(tmp_path, "b.txt")
    assert [file.name for file in listing_of(source).files] == ["a.txt"]
    fingerprint_source(source)
    assert [file.name for file in listing_of(source).files] == ["a.txt", "b.txt"]


def test_the_readme_names_every_ending_that_is_read() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert not [ending for ending in FORMAT_OF_ENDING if f"`{ending}`" not in readme]
