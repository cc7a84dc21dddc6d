"""Where results lie and whether they are done: artifacts under one storage root, local or s3://.

    <storage>/<pipeline name>/<stage>-<fingerprint>/   the files, and manifest.json written last

An artifact is done when its manifest is there and its fingerprint is the one asked for. The fingerprint is
part of the folder's name, so a changed config never meets the files of the old one. An artifact carries the
recipe that its fingerprint was made of, so a stage ends with `output.commit(counts, files)` and says no more.
"""

import errno
import hashlib
import json
import os
import posixpath
import re
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Recipe:
    """What decides a stage's result: the version of its format, its settings and its inputs' fingerprints."""

    format_version: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)  # name of the input -> its fingerprint

    def fingerprint(self, stage: str) -> str:
        """Hash the recipe together with the stage's name: 20 hex digits."""
        canonical = json.dumps(
            {"stage": stage} | asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=list
        )
        return hashlib.sha256(canonical.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact: its size and the SHA-256 of its bytes."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact holds and what it was made from; its presence means the artifact is whole."""

    stage: str
    fingerprint: str
    format_version: int
    inputs: dict[str, str]  # name of the input -> its fingerprint
    settings: dict[str, Any]  # the settings the fingerprint was made of
    counts: dict[str, Any]  # numbers a person wants to see, and facts later stages need
    files: dict[str, FileRecord]  # path inside the artifact -> record
    created: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True, default=list) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Parse a manifest; raises `ValueError` naming `where` if it is damaged or a file name leaves the folder."""
        try:
            facts = json.loads(text)
            files = {name: FileRecord(**record) for name, record in facts.pop("files").items()}
            manifest = cls(files=files, **facts)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"The manifest of {where} is damaged ({error}); delete that folder and run again."
            ) from None
        for name in files:
            check_relative(name, where)
        return manifest


def check_relative(name: str, where: str) -> str:
    """Return `name` if it stays inside its artifact; raises `ValueError` for absolute paths and '..'."""
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith(("/", "\\", "~")) or ".." in parts or "" in parts or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{where} names a file outside of itself: {name!r}. It was refused.")
    return name


@lru_cache(maxsize=16)
def _filesystem(protocol: str, endpoint: str, account: str, process_id: int) -> fsspec.AbstractFileSystem:
    if protocol == "file":
        return LocalFileSystem(auto_mkdir=True)
    if protocol == "s3":
        # Credentials, region and AWS_ENDPOINT_URL come from the environment, as everywhere else.
        retries = {"max_attempts": 8, "mode": "standard"}
        return fsspec.filesystem(
            "s3",
            use_listings_cache=False,
            skip_instance_cache=True,  # fsspec's own cache does not look at the environment
            config_kwargs={"retries": retries, "connect_timeout": 10, "read_timeout": 60},
        )
    raise ValueError(f"Storage on {protocol}:// is not supported; use a local folder or s3://bucket/prefix.")


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a local path or an s3:// URL, and the path in it."""
    protocol, path = ("file", url)
    if "://" in url:
        protocol, path = url.split("://", 1)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    # Per process: an s3fs instance carried over a fork hangs on its parent's event loop.
    account = os.environ.get("AWS_ACCESS_KEY_ID", "")
    return _filesystem(protocol, endpoint, account, os.getpid()), path.rstrip("/")


def resolve_storage(url: str) -> str:
    """Make a storage root absolute, so that it means the same on every worker of this machine."""
    if url.startswith("file://"):
        url = url[len("file://") :]
    return url.rstrip("/") if "://" in url else str(expand_home(url).resolve())


def expand_home(path: str | Path) -> Path:
    """Put the home folder where a local path has ~ or ~user; raises `ValueError` where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{str(path)!r} names the home folder of a user that is not on this machine.") from None


@dataclass(frozen=True)
class Artifact:
    """One folder under the storage root; cheap to make, to compare and to send to workers."""

    url: str
    stage: str
    fingerprint: str
    recipe: Recipe = field(default_factory=Recipe, compare=False, repr=False)  # the fingerprint stands for it

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        return filesystem_of(self.url)[0]

    @property
    def path(self) -> str:
        """The folder as its file system names it (no s3:// in front)."""
        return filesystem_of(self.url)[1]

    def file(self, name: str) -> str:
        """The path of one file, as the artifact's file system names it."""
        return posixpath.join(self.path, check_relative(name, self.url))

    def any_manifest(self) -> Manifest | None:
        """Read the manifest whatever its fingerprint, or None while there is none."""
        try:
            text = self.filesystem.cat_file(self.file(MANIFEST)).decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None
        return Manifest.from_json(text, self.url)

    def manifest(self) -> Manifest | None:
        """Read the manifest, or None while the artifact is not done; raises `ValueError` if it is another's."""
        manifest = self.any_manifest()
        if manifest is not None and manifest.fingerprint != self.fingerprint:
            raise ValueError(
                f"{self.url} was made with other settings (its fingerprint is {manifest.fingerprint},"
                f" not {self.fingerprint}); choose another name, or delete that folder."
            )
        return manifest

    @property
    def is_done(self) -> bool:
        return self.manifest() is not None

    def exists(self, name: str) -> bool:
        return bool(self.filesystem.exists(self.file(name)))

    def read_bytes(self, name: str) -> bytes:
        return self.filesystem.cat_file(self.file(name))

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode("utf-8")

    def write_bytes(self, name: str, content: bytes) -> FileRecord:
        """Write one file whole or not at all, and return its record for the manifest."""
        write_atomically(self.filesystem, self.file(name), content)
        return FileRecord(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def keep_file(self, name: str, path: Path) -> FileRecord:
        """Hold a local file that nobody will change: under a second name where both lie on one disk, else copied."""
        filesystem = self.filesystem
        if isinstance(filesystem, LocalFileSystem):
            link_or_copy(path, Path(self.file(name)))
        else:
            filesystem.put_file(str(path), self.file(name))
        return record_file(path)

    def write_text(self, name: str, content: str) -> FileRecord:
        return self.write_bytes(name, content.encode())

    def list_files(self) -> dict[str, int]:
        """List the files that lie there now, done or not: path inside the artifact -> bytes."""
        try:
            found = self.filesystem.find(self.path, detail=True)
        except FileNotFoundError:
            return {}
        start = len(self.path) + 1
        return {
            path[start:]: int(entry["size"])
            for path, entry in sorted(found.items())
            if entry["type"] == "file" and not path.endswith("/") and not posixpath.basename(path).startswith(".tmp-")
        }

    def commit(self, counts: Mapping[str, Any], files: Mapping[str, FileRecord]) -> Manifest:
        """Write the manifest, last: from here on the artifact is done."""
        manifest = Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            format_version=self.recipe.format_version,
            inputs=dict(self.recipe.inputs),
            settings=dict(self.recipe.settings),
            counts=dict(counts),
            files=dict(files),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for name in files:
            check_relative(name, self.url)
        self.write_text(MANIFEST, manifest.to_json())
        return manifest

    def upload(self, folder: Path, prefix: str = "") -> dict[str, FileRecord]:
        """Copy a local folder's files into the artifact; returns their records."""
        records = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = (
                posixpath.join(prefix, path.relative_to(folder).as_posix())
                if prefix
                else path.relative_to(folder).as_posix()
            )
            self.filesystem.put_file(str(path), self.file(name))
            records[name] = record_file(path)
        return records

    def download(self, folder: Path, records: Mapping[str, FileRecord] | None = None) -> Path:
        """Copy the artifact's files to a local folder and check each digest.

        Raises `ValueError` naming the file that is missing or damaged.
        """
        if records is None:
            manifest = self.manifest()
            if manifest is None:
                raise ValueError(f"{self.url} is not finished; run the {self.stage} stage first.")
            records = manifest.files
        for name, record in records.items():
            target = folder / check_relative(name, self.url)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.filesystem.get_file(self.file(name), str(target))
            except FileNotFoundError:
                raise ValueError(f"{name} is missing from {self.url}; delete that folder and run again.") from None
            check_digest(target, record, f"{self.url}/{name}")
        return folder

    def delete(self) -> None:
        """Remove the folder and all in it, the manifest first, so that it is never half there and done."""
        for path in (self.file(MANIFEST), self.path):
            if self.filesystem.exists(path):
                self.filesystem.rm(path, recursive=True)


def artifact_at(
    storage: str, name: str, stage: str, stage_fingerprint: str, folder: str = "", recipe: Recipe | None = None
) -> Artifact:
    """Name the artifact of one stage of one pipeline; nothing is read or made.

    Its folder is named by the fingerprint, or by `folder` where a person chose a name.
    """
    url = posixpath.join(resolve_storage(storage), name, f"{stage}-{folder or stage_fingerprint}")
    return Artifact(url, stage, stage_fingerprint, recipe or Recipe())


def write_atomically(filesystem: fsspec.AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part, even after a power cut."""
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, content)  # an S3 object appears whole
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}-{target.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def link_or_copy(path: Path, target: Path) -> None:
    """Put a file at `target` too, whole or not at all: as a hard link, or as a copy where there can be none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}-{target.name}")
    try:
        try:
            os.link(path, temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(path, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # also left by a rename onto the file itself


def record_file(path: Path) -> FileRecord:
    """Digest a local file without holding it in memory."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=digest)


def check_digest(path: Path, record: FileRecord, where: str) -> None:
    """Raise `ValueError` naming the file and both digests if its bytes are not those of its record."""
    found = record_file(path)
    if found != record:
        raise ValueError(
            f"{where} is damaged: its digest is {found.sha256[:12]}… ({found.bytes} bytes),"
            f" its manifest says {record.sha256[:12]}… ({record.bytes} bytes)."
        )


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in one line which settings changed."""
    rows = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted({*before, *now})
        if json.dumps(before.get(key), default=list) != json.dumps(now.get(key), default=list)
    ]
    return "; ".join(rows) + "." if rows else "its inputs differ."


def is_disk_full(error: BaseException | None) -> bool:
    """Tell whether an error means a full disk or a used-up quota; what writes by itself only says so in its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search("no space left on|disk quota exceeded|database or disk is full", str(error), re.IGNORECASE):
            return True
        error = error.__cause__ or error.__context__
    return False
