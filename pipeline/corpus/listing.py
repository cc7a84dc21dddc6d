"""What lies at one path of the source: a file, a folder or a glob, on this machine, S3 or the hub.

Hidden names (that start with . or _) are left out below a folder, however the folder was named; a hidden name that the
path itself spells is meant. A symbolic link counts under its own name, is followed, and what it leads to is read once.
"""

import glob
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import fsspec
from fsspec.utils import glob_translate

from pipeline.artifacts import expand_home, filesystem_of
from pipeline.corpus.endings import File
from pipeline.corpus.progress import Progress

HIDDEN = (".", "_")


@dataclass(frozen=True)
class Found:
    """Every file at a path, read or not."""

    files: list[File]
    is_one_file: bool = False  # the path names it


def list_path(path: str, progress: Progress) -> Found:
    """List the files at a path. Raises `ValueError` where nothing is, or where something may not be read."""
    filesystem, root = filesystem_at(path)
    is_local = "://" not in path or path.startswith("file://")
    try:
        found = _list_local(path, root, progress) if is_local else _list_remote(filesystem, path, root, progress)
    except FileNotFoundError:
        found = Found([])
    except PermissionError as error:
        raise ValueError(f"{path!r} may not be read ({error}).") from None
    if not found.files:
        raise ValueError(f"There is no file at {path!r}.")
    return found


def filesystem_at(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a file's URL or local path, and the path in it."""
    if url.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        return cast(fsspec.AbstractFileSystem, HfFileSystem()), url.removeprefix("hf://").rstrip("/")
    return filesystem_of(url if "://" in url else str(expand_home(url)))


def version_of(entry: dict[str, Any]) -> str:
    """What tells one version of a file from another, as its file system has it."""
    return str(entry.get("ETag") or entry.get("blob_id") or entry.get("mtime") or "")


@lru_cache(maxsize=8)
def pinned_revision(dataset: str, revision: str) -> str:
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


class Pattern:
    """A path with *, ? or [: the folder before the first of them, and which paths below it are meant."""

    def __init__(self, path: str, exists: Callable[[str], bool] = lambda path: False) -> None:
        """`exists` tells which of the folders on the way are there as they are written, brackets and all."""
        names = path.split("/")
        first = next(
            index
            for index, name in enumerate(names)
            if glob.has_magic(name) and not exists("/".join(names[: index + 1]))
        )
        self.folder = "/".join(names[:first]) or ("/" if path.startswith("/") else ".")
        self._names = names[first:]
        self._is_deep = any("**" in name for name in self._names)
        self._matches = re.compile(glob_translate("/".join(self._names))).match

    def covers_folder(self, below: str) -> bool:
        """Whether files under this folder can match."""
        return self._is_deep or below.count("/") + 1 < len(self._names)

    def matches(self, below: str) -> bool:
        return bool(self._matches(below)) and not self.is_hidden(below)

    def is_hidden(self, below: str) -> bool:
        """Whether a hidden name on the way is one that no part of the pattern spells."""
        spelled = {name[0] for name in self._names if name.startswith(HIDDEN)}
        return any(name.startswith(HIDDEN) and name[0] not in spelled for name in below.split("/"))


def _is_hidden(below: str) -> bool:
    return any(name.startswith(HIDDEN) for name in below.split("/"))


def _below(root: str, name: str) -> str:
    return name.removeprefix(root).lstrip("/") if name.startswith(root) else posixpath.basename(name)


# On this machine --------------------------------------------------------------------------------------------------


def _list_local(path: str, root: str, progress: Progress) -> Found:
    prefix = "file://" if path.startswith("file://") else ""
    root = os.path.abspath(root or "/")
    if glob.has_magic(root) and not os.path.lexists(root):
        pattern = Pattern(root, os.path.lexists)
        entries = _walk(pattern.folder, progress, pattern)
        return Found([_local_file(prefix, *entry) for entry in entries])
    status = os.stat(root)  # raises FileNotFoundError
    if stat.S_ISDIR(status.st_mode):
        return Found([_local_file(prefix, *entry) for entry in _walk(root, progress, None)])
    real = os.path.realpath(root)
    return Found([_local_file(prefix, root, real, status)] if stat.S_ISREG(status.st_mode) else [], is_one_file=True)


def _local_file(prefix: str, given: str, real: str, status: os.stat_result) -> File:
    url = prefix + (given if prefix else real)
    # A link is known by its own name; for other files the name is the same, and the path without links is kept.
    is_link = posixpath.basename(given) != posixpath.basename(real)
    return File(url, status.st_size, str(status.st_mtime), given if is_link else "")


def _walk(folder: str, progress: Progress, pattern: Pattern | None) -> Iterator[tuple[str, str, os.stat_result]]:
    """Yield (path as named, path without links, status) of the files below a folder, through links.

    Raises `ValueError` for a link that leads to nothing, or back to a folder it lies in.
    """
    waiting = [(folder, os.path.realpath(folder), "", frozenset[str]())]
    seen = {waiting[0][1]}
    while waiting:
        named, real, below, above = waiting.pop()
        above |= {real}
        with os.scandir(real) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
        for entry in entries:
            entry_below = posixpath.join(below, entry.name)
            if pattern.is_hidden(entry_below) if pattern else entry.name.startswith(HIDDEN):
                continue
            is_wanted_folder = pattern is None or pattern.covers_folder(entry_below)
            is_wanted_file = pattern is None or pattern.matches(entry_below)
            if not (is_wanted_folder or is_wanted_file):
                continue
            entry_named, entry_real = posixpath.join(named, entry.name), posixpath.join(real, entry.name)
            if entry.is_symlink():
                entry_real = os.path.realpath(entry_real)
            status = _status(entry, entry_named)
            if stat.S_ISDIR(status.st_mode) and is_wanted_folder:
                if entry_real in above:
                    raise ValueError(f"{entry_named} is a link back to {entry_real}, which it lies in; remove it.")
                if entry_real not in seen:
                    seen.add(entry_real)
                    waiting.append((entry_named, entry_real, entry_below, above))
            elif stat.S_ISREG(status.st_mode) and is_wanted_file:
                progress.add(1)
                yield entry_named, entry_real, status


def _status(entry: os.DirEntry[str], named: str) -> os.stat_result:
    try:
        return entry.stat()
    except OSError as error:
        if not entry.is_symlink():
            raise
        raise ValueError(
            f"{named} is a link to {os.readlink(entry.path)}, which cannot be followed ({error.strerror});"
            f" mend it or remove it."
        ) from None


# On S3 and the hub ------------------------------------------------------------------------------------------------


def _list_remote(filesystem: fsspec.AbstractFileSystem, path: str, root: str, progress: Progress) -> Found:
    prefix = f"{path.split('://')[0]}://"
    is_one_file = False
    if glob.has_magic(root) and not filesystem.exists(root):
        pattern = Pattern(root)
        start = len(pattern.folder) + 1
        entries = {
            name: entry
            for name, entry in filesystem.glob(root, detail=True).items()
            if not pattern.is_hidden(name[start:])
        }
    else:
        entries = {root: filesystem.info(root)} if File(root, 0).format else {}
        is_one_file = bool(entries) and entries[root]["type"] != "directory"
        if not is_one_file:
            found = filesystem.find(root, detail=True)
            is_one_file = list(found) == [root]
            entries = {name: entry for name, entry in found.items() if not _is_hidden(_below(root, name))}
    files = [
        File(prefix + name, int(entry.get("size") or 0), version_of(entry))
        for name, entry in entries.items()
        if entry["type"] == "file" and not name.endswith("/")
    ]
    progress.add(len(files))
    return Found(files, is_one_file)
