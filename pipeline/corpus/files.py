"""The input's files: found, named by a fingerprint, and cut into slices that do not depend on who reads them.

    for slice_ in slices(config.source, slice_bytes):     # on the driver: names and sizes only, no text

A slice of the input is small enough for one task, and the same input is always cut into the same slices: shards are
made one slice each, so their bytes depend on neither the number of workers nor on what was interrupted. A large file
that can only be read from its start (.gz, .zst, tar archives) is one slice, a stream, which `formats.read_pieces` cuts
into pieces as it passes.
"""

import hashlib
import json
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import filesystem_of
from pipeline.config import SourceConfig
from pipeline.corpus import python_docs

FORMAT_OF_ENDING = {
    **dict.fromkeys((".txt", ".text"), "txt"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".warc", ".wet"), "warc"),
    **dict.fromkeys((".tar", ".tgz"), "tar"),
}
# Compression -> how many bytes of English one byte holds; only for balancing the work and showing progress.
EXPANSION = {".gz": 2.7, ".zst": 3.0, ".xz": 3.3, ".bz2": 3.3, "": 1.0}


@dataclass(frozen=True)
class File:
    """One input file: where it is, how large, and what tells one version of it from another."""

    url: str
    size: int
    version: str = ""

    @property
    def compression(self) -> str:
        ending = Path(self.url).suffix.lower()
        return ending if ending in EXPANSION else ""

    @property
    def format(self) -> str:
        name = Path(self.url).name.lower().removesuffix(self.compression)
        # OpenWebText's inner archives are called *_data.xz: an unknown name under a compression is a tar.
        return FORMAT_OF_ENDING.get(Path(name).suffix, "tar" if self.compression else "")

    @property
    def text_bytes(self) -> float:
        return self.size * (EXPANSION[".xz"] if self.format == "tar" else EXPANSION[self.compression])


@dataclass(frozen=True)
class Slice:
    """A part of the input for one task: some files whole, or a range of one."""

    name: str
    format: str
    files: tuple[str, ...]
    text_bytes: int  # about; for progress
    start: int = 0  # of .jsonl and .txt: bytes; of .parquet: row groups
    stop: int = -1
    is_stream: bool = False  # more than one task's work: `formats.read_pieces` cuts it


def fingerprint_source(source: SourceConfig) -> str:
    """Hash what the documents depend on: the settings, and the files' names, sizes and versions."""
    facts: dict[str, Any] = {"kind": source.kind, "column": source.text_column, "split": source.split_text}
    facts["invalid"] = source.invalid_text
    if source.kind == "python-docs":
        facts["content"] = [platform.python_version(), *python_docs.packages()]
    else:
        facts["content"] = [[file.url, file.size, file.version] for file in find_files(source)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


# Finding files ----------------------------------------------------------------------------------------------------


def find_files(source: SourceConfig) -> list[File]:
    """List the input's files in the order of their names; raises `ValueError` where a path leads to none."""
    paths = source.paths
    if source.kind == "openwebtext" and not paths:
        paths = [f"hf://datasets/{source.dataset}@{_pinned_revision(source.dataset, source.revision)}"]
    files: dict[str, File] = {}
    for path in paths:
        found = _list(path)
        if source.kind == "openwebtext":
            found = _one_layout(found)
        if not found:
            raise ValueError(f"There is no text file at {path!r}: looked for {', '.join(FORMAT_OF_ENDING)}.")
        files.update((file.url, file) for file in found)
    return [files[url] for url in sorted(files)]


def _list(path: str) -> list[File]:
    filesystem, root = filesystem_at(path)
    prefix = f"{path.split('://')[0]}://" if "://" in path else ""
    try:
        if any(mark in root for mark in "*?["):
            entries = filesystem.glob(root, detail=True)
        elif FORMAT_OF_ENDING.get(Path(root).suffix) or Path(root).suffix in EXPANSION:
            entries = {root: filesystem.info(root)}
            if entries[root]["type"] == "directory":
                entries = filesystem.find(root, detail=True)
        else:
            entries = filesystem.find(root, detail=True)
    except FileNotFoundError:
        entries = {}
    except PermissionError as error:
        raise ValueError(f"{path!r} may not be read ({error}).") from None
    if not entries:
        raise ValueError(f"There is no file at {path!r}.")
    files = []
    for name, entry in entries.items():
        version = str(entry.get("ETag") or entry.get("blob_id") or entry.get("mtime") or "")
        file = File(prefix + (name if prefix else str(Path(name).resolve())), int(entry.get("size") or 0), version)
        below = name.removeprefix(root) if name.startswith(root) else Path(name).name  # a path given by name is meant
        hidden = any(part.startswith((".", "_")) for part in below.split("/"))
        if entry["type"] == "file" and file.format and not hidden:
            files.append(file)
    return files


def _one_layout(files: list[File]) -> list[File]:
    """Choose among the layouts that OpenWebText lies about in: one place may hold it several times over."""
    parquet = [file for file in files if file.format == "parquet"]
    archives = [file for file in files if file.format == "tar"]
    whole = [file for file in archives if Path(file.url).name == "openwebtext.tar.xz"]
    subsets = [file for file in archives if Path(file.url).suffix == ".tar"]
    inner = [file for file in archives if Path(file.url).suffix == ".xz" and file not in whole]
    plain = [file for file in files if file.format in ("txt", "jsonl") and Path(file.url).stem.lower() != "readme"]
    return next((layout for layout in (parquet, subsets, whole, inner, plain) if layout), [])


@lru_cache(maxsize=8)
def _pinned_revision(dataset: str, revision: str) -> str:
    """Turn a branch or tag into the commit that it is now, so that one run reads one version."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
    except Exception as error:
        raise ValueError(
            f"The hub has no answer for {dataset!r} at {revision!r} ({type(error).__name__});"
            f" check the name, the network and HF_TOKEN, or give a mirror in source.paths."
        ) from None
    assert commit is not None
    return commit


def filesystem_at(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a file's URL or local path, and the path in it."""
    if url.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return cast(fsspec.AbstractFileSystem, HfFileSystem()), url.removeprefix("hf://").rstrip("/")
    if "://" not in url:
        url = str(Path(url).expanduser())
    return filesystem_of(url)


# Cutting into slices ----------------------------------------------------------------------------------------------


def slices(source: SourceConfig, slice_bytes: int) -> list[Slice]:
    """Cut the input into slices of about `slice_bytes` of text; a pure function of its files."""
    if source.kind == "python-docs":
        return [Slice("00000", "python-docs", (), python_docs.LIMIT_BYTES)]
    files = find_files(source)
    footers = _read_footers([file for file in files if file.format == "parquet"], source.text_column)
    cut: list[Slice] = []
    group: list[File] = []

    def add(names: tuple[str, ...], kind: str, text_bytes: float, **rest: Any) -> None:
        cut.append(Slice(f"{len(cut):05d}", kind, names, int(text_bytes), **rest))

    def close_group() -> None:
        if group:
            add(tuple(file.url for file in group), group[0].format, sum(file.text_bytes for file in group))
            group.clear()

    for file in files:
        can_seek = file.format == "jsonl" or (file.format == "txt" and source.split_text == "blank-lines")
        if file.format == "parquet":
            close_group()
            start, collected = 0, 0
            for row_group, size in enumerate(footers[file.url]):
                collected += size
                if collected >= slice_bytes or row_group == len(footers[file.url]) - 1:
                    add((file.url,), "parquet", collected, start=start, stop=row_group + 1)
                    start, collected = row_group + 1, 0
        elif file.text_bytes <= slice_bytes or not (can_seek or file.format == "tar"):
            # Small files share a slice. A large one that is a single document, or a WARC, is a slice of its own.
            collected = int(sum(each.text_bytes for each in group))
            if group and (group[0].format != file.format or collected + file.text_bytes > slice_bytes):
                close_group()
            group.append(file)
        elif file.compression or file.format == "tar":
            close_group()
            add((file.url,), file.format, file.text_bytes, is_stream=True)
        else:
            close_group()
            count = -(-file.size // slice_bytes)
            edges = [file.size * index // count for index in range(count + 1)]
            for start, stop in pairwise(edges):
                add((file.url,), file.format, stop - start, start=start, stop=stop)
    close_group()
    return cut


def _read_footers(files: list[File], column: str) -> dict[str, list[int]]:
    """Return the size of each row group's text, by file; raises `ValueError` where the column is missing."""

    def read_footer(file: File) -> list[int]:
        filesystem, path = filesystem_at(file.url)
        try:
            with filesystem.open(path, "rb") as handle:
                metadata = pq.read_metadata(handle)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file.url} is not a Parquet file ({str(error).splitlines()[0]}).") from None
        names = metadata.schema.to_arrow_schema().names
        if column not in names:
            raise ValueError(f"{file.url} has no column {column!r}; it has {', '.join(names)}. Set source.text_column.")
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        return [
            sum(
                chunk.total_uncompressed_size
                for chunk in map(group.column, range(metadata.num_columns))
                if chunk.path_in_schema.split(".")[0] == column
            )
            for group in groups
        ]

    with ThreadPoolExecutor(max_workers=16) as pool:
        return dict(zip((file.url for file in files), pool.map(read_footer, files), strict=True))
