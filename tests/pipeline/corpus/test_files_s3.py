"""On S3 the same files are found as on a disk, and one that was replaced is named."""

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from pipeline.artifacts import filesystem_of
from pipeline.config import SourceConfig
from pipeline.corpus.files import find_files, slices
from pipeline.corpus.formats import read
from tests.pipeline.corpus.tiny_corpus import documents, files, jsonl

NAMES = ("a.txt", "deep/b.jsonl.gz", "c[1].txt", ".d.txt", "deep/_e/f.txt", "g.pdf", "deep/h.md")


def source_of(*paths: str) -> SourceConfig:
    return SourceConfig(kind="files", paths=list(paths))


def names(*paths: str) -> list[str]:
    return [file.name for file in find_files(source_of(*paths)).files]


@pytest.fixture
def filesystem(bucket: str) -> fsspec.AbstractFileSystem:
    return filesystem_of(bucket)[0]


def test_the_same_is_found_as_on_a_disk(bucket: str, filesystem: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        filesystem.pipe_file(f"{bucket}/same/{name}", name.encode())
    for below in ("", "/*.txt", "/**", "/**/*.md", "/c[1].txt", "/deep/_e/*", "/*/b.jsonl.gz"):
        assert names(f"{bucket}/same{below}") == names(f"{tmp_path}{below}"), below
    there = find_files(source_of(f"{bucket}/same"))
    assert there.ignored == find_files(files(tmp_path)).ignored == {".pdf": 1}
    for missing in ("nothing", "a.text", "*.jsonl"):
        with pytest.raises(ValueError, match="There is no file at"):
            names(f"{bucket}/same/{missing}")
    with pytest.raises(ValueError, match=r"g\.pdf cannot be read"):
        names(f"{bucket}/same/g.pdf")


def test_ranges_of_an_object_give_its_documents(bucket: str, filesystem: fsspec.AbstractFileSystem) -> None:
    texts = [f"document {number}" for number in range(50)]
    filesystem.pipe_file(f"{bucket}/ranges/x.jsonl", jsonl(texts))
    filesystem.pipe_file(f"{bucket}/ranges/y.json", b'[{"text": "in an array"}, {"text": "too"}]')
    assert documents(source_of(f"{bucket}/ranges"), 300) == [*texts, "in an array", "too"]


@pytest.mark.parametrize("content", [lambda: jsonl(["other"] * 1000), lambda: jsonl(["2" * 10_000] * 1200)])
def test_an_object_that_was_replaced_is_named(
    bucket: str, filesystem: fsspec.AbstractFileSystem, content: Callable[[], bytes]
) -> None:
    path = f"{bucket}/replaced/x.jsonl"
    for is_begun in (False, True):
        filesystem.pipe_file(path, jsonl(["1" * 10_000] * 1200))
        source = source_of(path)
        (slice_,) = slices(source, 10**9)
        found = read(slice_, source)
        if is_begun:
            next(found)
        filesystem.pipe_file(path, content())
        with pytest.raises(ValueError, match=r"x\.jsonl changed while it was read"):
            list(found)
