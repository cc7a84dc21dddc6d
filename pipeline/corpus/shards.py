"""Token shards as flat arrays: each Parquet file decoded once per node, checked, and mapped into memory.

    shards = open_shards(artifact, "train")          # reads the manifest and the Parquet footers, no tokens
    tokens = TokenCache(folder).open(shards[0])      # numpy array over a local file, uint16 or uint32

The local file is named by the digest of the Parquet file it was decoded from, so runs and artifacts share it
and it can never be stale.

A shard of conversations has a second column, `learn`: which of a conversation's tokens are learnt. Its flat array is
of uint32, in which a learnt token carries the bit `LEARNT` and a conversation's last token the bit `LAST`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from model.tokenizer import Tokenizer
from pipeline.artifacts import Artifact, FileRecord, check_digest, expand_home

FOOTER_BYTES = 65_536  # more than the footer of a shard of 50 row groups; a longer one costs a second read
GIGABYTE = 10**9
ROW_GROUP_TOKENS = 1_000_000
# Marks in the flat arrays of conversations; no vocabulary is so large that its ids reach them.
SMALLEST_MAPPED_BYTES = 2**20  # each mapped file keeps a descriptor open, of which a process may have 1,024
LEARNT, LAST = np.uint32(1 << 31), np.uint32(1 << 30)
TOKEN_BITS = np.uint32((1 << 30) - 1)
LENGTHS = b"conversation_lengths"  # in the footer: how many conversations have how many tokens


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a split, as its manifest and its footer describe it."""

    artifact: Artifact
    name: str
    record: FileRecord
    num_tokens: int
    dtype: str  # uint16 or uint32; of conversations always uint32
    lengths: Mapping[int, int] | None = None  # of conversations: tokens -> how many have so many; None: text

    @property
    def where(self) -> str:
        return f"{self.artifact.url}/{self.name} (sha256 {self.record.sha256})"

    @property
    def decoded_bytes(self) -> int:
        return self.num_tokens * np.dtype(self.dtype).itemsize


def open_shards(artifact: Artifact, split: str) -> list[Shard]:
    """Describe every shard of a split, in the order of their names.

    Raises `ValueError` naming the first shard that is missing, cut short or not a shard: before any training,
    and from one listing and the footers alone.
    """
    manifest = artifact.manifest()
    if manifest is None:
        raise ValueError(f"{artifact.url} is not finished; run the prepare stage first.")
    names = sorted(name for name in manifest.files if name.startswith(f"{split}/") and name.endswith(".parquet"))
    present = artifact.list_files()
    for name in names:
        record = manifest.files[name]
        if name not in present:
            raise _missing(f"{artifact.url}/{name}", record)
        if present[name] != record.bytes:
            raise ValueError(
                f"{artifact.url}/{name} is damaged: it has {present[name]} bytes, its manifest says {record.bytes}"
                f" (sha256 {record.sha256}); run the prepare stage again with --from prepare."
            )
    with ThreadPoolExecutor(max_workers=16) as threads:
        return list(threads.map(lambda name: _describe(artifact, name, manifest.files[name]), names))


def _missing(where: str, record: FileRecord) -> ValueError:
    return ValueError(
        f"{where} is missing; its manifest names it with sha256 {record.sha256}"
        f" ({record.bytes} bytes). Run the prepare stage again with --from prepare."
    )


def _describe(artifact: Artifact, name: str, record: FileRecord) -> Shard:
    length = FOOTER_BYTES
    try:
        while True:
            # The footer lies at the end and is all that read_metadata looks at.
            start = max(0, record.bytes - length)
            tail = artifact.filesystem.cat_file(artifact.file(name), start=start, end=record.bytes)
            needed = int.from_bytes(tail[-8:-4], "little") + 8
            if needed <= len(tail) or len(tail) >= record.bytes:
                break
            length = needed
        footer = pq.read_metadata(pa.BufferReader(tail))
        value_type = footer.schema.to_arrow_schema().field("tokens").type.value_type
        num_tokens = sum(_column(footer.row_group(group)).num_values for group in range(footer.num_row_groups))
    except (pa.ArrowException, KeyError, AttributeError) as error:
        raise ValueError(
            f"{artifact.url}/{name} (sha256 {record.sha256}) is not a token shard: {str(error).splitlines()[0]}."
        ) from None
    if str(value_type) not in ("uint16", "uint32"):
        raise ValueError(f"{artifact.url}/{name} holds tokens as {value_type}; a shard has uint16 or uint32.")
    written = (footer.metadata or {}).get(LENGTHS)
    if written is None:
        return Shard(artifact, name, record, num_tokens, str(value_type))
    lengths = {int(length): count for length, count in json.loads(written).items()}
    return Shard(artifact, name, record, num_tokens, "uint32", lengths)


def _column(row_group: pq.RowGroupMetaData) -> pq.ColumnChunkMetaData:
    for index in range(row_group.num_columns):
        if row_group.column(index).path_in_schema.split(".")[0] == "tokens":
            return row_group.column(index)
    raise KeyError("it has no column named tokens")


def holds_conversations(artifact: Artifact) -> bool:
    """Whether the shards' documents are conversations, of which some tokens are learnt and others not."""
    manifest = artifact.manifest()
    return manifest is not None and "learnt_tokens" in manifest.counts.get("train", {})


def data_digest(shards: list[Shard]) -> str:
    """Name the content of a split: a hash over its shards' digests, in order."""
    return hashlib.sha256("\n".join(shard.record.sha256 for shard in shards).encode()).hexdigest()


def default_cache_folder() -> Path:
    """A folder of this user's own on this node's disk."""
    return Path(tempfile.gettempdir()) / f"gpt-token-cache-{os.getuid()}"


class TokenCache:
    """Decoded shards in one local folder, shared by every process of the node and bounded in size.

    A file appears whole or not at all: it is decoded beside its final name and renamed. A file lock (released
    by the kernel when its holder dies, however it dies) lets one process decode while the others wait. A file
    that is evicted while mapped stays readable for those who mapped it.
    """

    def __init__(self, folder: Path | str | None = None, max_bytes: int = 64 * GIGABYTE) -> None:
        self.folder = expand_home(folder) if folder else default_cache_folder()
        self.max_bytes = max_bytes
        self._unlisted_bytes = 0
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            # Anyone can make a folder in /tmp, and its owner can replace the tokens in it.
            raise ValueError(f"The token cache {self.folder} belongs to another user; set stream.cache_folder.")

    def check_room(self, needed_bytes: int) -> None:
        """Raise `ValueError` where the windows that are open at a time do not fit."""
        if needed_bytes > self.max_bytes:
            raise ValueError(
                f"stream.cache_gigabytes is {self.max_bytes / GIGABYTE:g}; a window of the corpus and the next one take"
                f" {needed_bytes / GIGABYTE:.3g}. Raise it, or lower stream.window_tokens."
            )

    def open(self, shard: Shard) -> np.ndarray:
        """Return the shard's tokens, mapped, or read where they are few; the first to ask decodes it.

        Raises `ValueError` if it is corrupt.
        """
        while True:
            try:
                return self._map(shard)
            except FileNotFoundError:
                self._decode(shard)  # then map it again, for another process may evict it in between

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.record.sha256}.{shard.dtype if shard.lengths is None else 'marked'}"

    def _map(self, shard: Shard) -> np.ndarray:
        path = self._path(shard)
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != shard.decoded_bytes:
                path.unlink(missing_ok=True)
                raise FileNotFoundError(path)
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # what was used last is evicted last
            if shard.decoded_bytes < SMALLEST_MAPPED_BYTES:
                return np.fromfile(file, dtype=shard.dtype)
            # As a plain array: slicing a np.memmap takes several times as long.
            return np.asarray(np.memmap(file, dtype=shard.dtype, mode="r"))

    def _decode(self, shard: Shard) -> None:
        with self._locked(shard.record.sha256):
            path = self._path(shard)
            if path.exists():
                return
            # Nobody else writes this name while the lock is held: a killed process's leftover is overwritten.
            partial = path.with_suffix(f"{path.suffix}.partial")
            try:
                self._make_room(shard.decoded_bytes)
                with _local_copy(shard, self.folder) as source:
                    check_digest(source, shard.record, f"{shard.artifact.url}/{shard.name}")
                    _write_tokens(source, shard, partial)
                os.replace(partial, path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ValueError(
                    f"The disk of the token cache {self.folder} is full; make room there, set stream.cache_folder"
                    " to another disk, or lower stream.cache_gigabytes."
                ) from None
            finally:
                partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, digest: str, wait: bool = True) -> Iterator[None]:
        """Hold the lock of a digest; raises `BlockingIOError` if another holds it and `wait` is false.

        A lock file is never removed, for a process that waits on a removed one would lock nobody out. So digests share
        them by their first two digits: 256 files at most, and a wait for another shard's decoding now and then.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a cleaner of /tmp may have been here
        with open(self.folder / f"{digest[:2]}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def _make_room(self, wanted_bytes: int) -> None:
        """Delete the files used longest ago until `wanted_bytes` more fit, and the leftovers of killed processes.

        Listing the folder takes longer than decoding a small shard. So it is listed again only when this process has
        written a thirty-second of the bound, or half of the room that was left: by so much each process of the node
        may exceed the bound.
        """
        if wanted_bytes <= self._unlisted_bytes and wanted_bytes < shutil.disk_usage(self.folder).free:
            self._unlisted_bytes -= wanted_bytes
            return
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".partial":
                    # Whoever is writing it holds its lock.
                    with contextlib.suppress(BlockingIOError), self._locked(path.name.split(".")[0], wait=False):
                        path.unlink()
                elif path.suffix != ".lock":
                    files.append((path.stat().st_mtime, path.stat().st_size, path))
        held = sum(size for _, size, _ in files)
        excess = max(held + wanted_bytes - self.max_bytes, wanted_bytes - shutil.disk_usage(self.folder).free)
        # One in sixteen more than needed goes, so that a full cache of many files is not listed for every shard.
        spared = len(files) // 16 if excess > 0 else 0
        for _, size, path in sorted(files):
            if excess <= 0:
                spared -= 1
                if spared < 0:
                    break
            path.unlink(missing_ok=True)
            excess -= size
        self._unlisted_bytes = min(max(-excess, 0), self.max_bytes // 16) // 2


@contextlib.contextmanager
def _local_copy(shard: Shard, folder: Path) -> Iterator[Path]:
    """The shard's Parquet file on this machine: where it lies, or a download that is deleted afterwards."""
    filesystem, path = shard.artifact.filesystem, shard.artifact.file(shard.name)
    if isinstance(filesystem, LocalFileSystem):
        if not Path(path).exists():
            raise _missing(f"{shard.artifact.url}/{shard.name}", shard.record)
        yield Path(path)
        return
    download = folder / f"{shard.record.sha256}.parquet.partial"
    try:
        try:
            filesystem.get_file(path, str(download))
        except FileNotFoundError:
            raise _missing(f"{shard.artifact.url}/{shard.name}", shard.record) from None
        yield download
    finally:
        download.unlink(missing_ok=True)


def _write_tokens(source: Path, shard: Shard, target: Path) -> None:
    """Decode row group by row group, so that memory holds one of them, and check that documents end as one."""
    end_of_text: Any = None
    written = 0
    columns = ["tokens"] if shard.lengths is None else ["tokens", "learn"]
    with pq.ParquetFile(source, memory_map=True) as parquet, open(target, "wb") as file:
        for group in range(parquet.num_row_groups):
            for batch in parquet.read_row_group(group, columns=columns).to_batches():
                chunk = batch.column("tokens")
                tokens = np.asarray(chunk.flatten())
                offsets = np.asarray(chunk.offsets)
                if (np.diff(offsets) < 1).any():
                    raise ValueError(f"{shard.where} holds a document without a token.")
                last = tokens[offsets[1:] - offsets[0] - 1]
                end_of_text = last[0] if end_of_text is None and len(last) else end_of_text
                if (last != end_of_text).any():
                    raise ValueError(f"{shard.where} holds a document that does not end with the end-of-text token.")
                if shard.lengths is not None:
                    learn = batch.column("learn").flatten().to_numpy(zero_copy_only=False)
                    tokens = tokens | np.where(learn, LEARNT, np.uint32(0))
                    tokens[offsets[1:] - offsets[0] - 1] |= LAST
                file.write(tokens.data)
                written += len(tokens)
        if written != shard.num_tokens:
            raise ValueError(f"{shard.where} holds {written} tokens; its footer says {shard.num_tokens}.")
        file.flush()
        os.fsync(file.fileno())  # else a power cut after the renaming may leave a file of the right size full of zeros


# Writing ----------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Collects documents into row groups, row groups into files, and writes each file whole."""

    def __init__(
        self, output: Artifact, name: str, tokenizer: Tokenizer, most_tokens: int = 0, conversations: bool = False
    ) -> None:
        """`name` may hold a place for a number: then a new file begins after `most_tokens`."""
        self._output = output
        self._name = name
        self._most_tokens = most_tokens
        self._conversations = conversations
        columns = {"tokens": pa.from_numpy_dtype(tokenizer.dtype)} | ({"learn": pa.bool_()} if conversations else {})
        self._schema = pa.schema(
            [pa.field(name, pa.list_(pa.field("element", kind, nullable=False))) for name, kind in columns.items()],
            metadata={
                "tokenizer": tokenizer.name,
                "tokenizer_digest": tokenizer.digest,
                "vocabulary_size": str(tokenizer.vocab_size),
                "end_of_text": str(tokenizer.end_of_text),
            },
        )
        self._end = np.array([tokenizer.end_of_text], dtype=tokenizer.dtype)
        self._files: dict[str, FileRecord] = {}
        self._sink: pa.BufferOutputStream | None = None
        self._clear_group()
        self._file_tokens = 0

    def add(self, ids: np.ndarray, learn: np.ndarray | None = None) -> None:
        """Add one document; a text's end is marked here, a conversation brings its own, and what is learnt of it."""
        assert (learn is not None) == self._conversations
        self._documents += [ids] if self._conversations else [ids, self._end]
        if learn is not None:
            self._learn.append(learn)
        self._ends.append(self._ends[-1] + len(ids) + (not self._conversations))
        if self._ends[-1] >= ROW_GROUP_TOKENS:
            self._write_group()
            if 0 < self._most_tokens <= self._file_tokens:
                self._close_file()

    def close(self) -> dict[str, FileRecord]:
        """Write what is left, and return the record of every file."""
        self._write_group()
        self._close_file()
        return self._files

    def _clear_group(self) -> None:
        self._documents: list[np.ndarray] = []
        self._learn: list[np.ndarray] = []
        self._ends = [0]

    def _write_group(self) -> None:
        if not self._documents:
            return
        if self._sink is None:
            self._sink = pa.BufferOutputStream()
            self._lengths: Counter[int] = Counter()
            # Splitting the bytes halves the time of writing, reads faster and is a tenth smaller than a dictionary.
            self._writer = pq.ParquetWriter(
                self._sink,
                self._schema,
                compression="zstd",
                use_dictionary=False,
                column_encoding={"tokens.list.element": "BYTE_STREAM_SPLIT"},
                write_statistics=False,
            )
        offsets = pa.array(np.array(self._ends, dtype=np.int32))
        values = [self._documents] + ([self._learn] if self._conversations else [])
        lists = [
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(parts)), type=field.type)
            for field, parts in zip(self._schema, values, strict=True)
        ]
        self._writer.write_table(pa.table(lists, schema=self._schema), row_group_size=len(lists[0]))
        self._lengths.update(np.diff(self._ends).tolist())
        self._file_tokens += self._ends[-1]
        self._clear_group()

    def _close_file(self) -> None:
        if self._sink is None:
            return
        if self._conversations:
            self._writer.add_key_value_metadata({LENGTHS: json.dumps(dict(sorted(self._lengths.items()))).encode()})
        self._writer.close()
        name = self._name.format(len(self._files))
        self._files[name] = self._output.write_bytes(name, self._sink.getvalue().to_pybytes())
        self._sink = None
        self._file_tokens = 0
