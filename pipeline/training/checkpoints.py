"""Checkpoints of a training that is under way: written in the background, whole or not at all.

    <run>/checkpoints/step-00001000-3f2a91c0/   a Hugging Face model folder, training_state.pt, progress.json,
                                                and manifest.json, written last, with a digest per file

The end of the name is random: a worker that is cut off and a new one in its place never write the same folder.
"""

import errno
import logging
import os
import posixpath
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.artifacts import Artifact, Manifest, Recipe, check_digest, is_disk_full, record_file
from pipeline.training.scratch import make_scratch

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
FOLDER = "checkpoints"


class CheckpointStore:
    """The checkpoints of one run, on local disk or s3://."""

    def __init__(self, run: Artifact, keep: int) -> None:
        self._run = run
        self._keep = keep

    def at(self, name: str) -> Artifact:
        url = f"{self._run.url}/{FOLDER}/{name}"
        return Artifact(url, "checkpoint", self._run.fingerprint, Recipe(FORMAT_VERSION))

    def names(self) -> list[str]:
        """List all folders, whole or not, the newest step first."""
        filesystem = self._run.filesystem
        try:
            entries = filesystem.ls(self._run.file(FOLDER), detail=False)
        except FileNotFoundError:
            return []
        names = [posixpath.basename(entry.rstrip("/")) for entry in entries]
        return sorted((name for name in names if name.startswith("step-")), reverse=True)

    def whole(self) -> Iterator[tuple[str, Manifest]]:
        """Yield the finished ones, newest first; one whose manifest is damaged is passed over with a warning."""
        for name in self.names():
            try:
                manifest = self.at(name).manifest()
            except ValueError as error:
                logger.warning("Checkpoint %s is passed over: %s", name, error)
                continue
            if manifest is not None:
                yield name, manifest

    def newest(self, folder: Path) -> str | None:
        """Name the newest checkpoint whose every file has its digest; what must be copied for that goes to `folder`."""
        for name, _ in self.whole():
            try:
                self.fetch(name, folder / name)
                return name
            except ValueError as error:
                logger.warning("Checkpoint %s is passed over, the one before it is used: %s", name, error)
        return None

    def fetch(self, name: str, folder: Path) -> Path:
        """Check a checkpoint's digests and return a local folder that holds it: itself, where storage is local."""
        artifact = self.at(name)
        if not isinstance(artifact.filesystem, LocalFileSystem):
            with named_errors("read", artifact):
                return artifact.download(folder)
        manifest = artifact.manifest()
        if manifest is None:
            raise ValueError(f"{artifact.url} is not finished.")
        for file, record in manifest.files.items():
            path = Path(artifact.file(file))
            if not path.is_file():
                raise ValueError(f"{file} is missing from {artifact.url}.")
            check_digest(path, record, str(path))
        return Path(artifact.path)

    def write(self, step: int, counts: dict[str, Any], save: Callable[[Path], None]) -> str:
        """Have `save` fill a folder, bring it to its place, mark it done, and remove the ones no longer kept."""
        name = f"step-{step:08d}-{secrets.token_hex(4)}"
        artifact = self.at(name)
        local = isinstance(artifact.filesystem, LocalFileSystem)
        folder = Path(artifact.path) if local else make_scratch(self._run.fingerprint, "checkpoint")
        try:
            save(folder)
            with named_errors("write", artifact):
                if local:
                    paths = sorted(path for path in folder.rglob("*") if path.is_file())
                    files = {path.relative_to(folder).as_posix(): record_file(path) for path in paths}
                else:
                    files = artifact.upload(folder)
                artifact.commit({"step": step, **counts}, files)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)  # on a full disk it would keep the space that the end needs
            if is_disk_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent)) from error
            raise
        if not local:
            shutil.rmtree(folder, ignore_errors=True)
        self.remove_old()
        return name

    def best(self) -> str | None:
        """Name the checkpoint with the fewest bits per byte on the val split."""
        scored = [
            (manifest.counts["bits_per_byte"], -manifest.counts["step"], name)
            for name, manifest in self.whole()
            if manifest.counts.get("bits_per_byte") is not None
        ]
        return min(scored)[2] if scored else None

    def remove_old(self) -> None:
        """Keep the newest ones and the best one."""
        whole = [name for name, _ in self.whole()]
        kept = {*whole[: self._keep], self.best()}
        for name in whole:
            if name not in kept:
                self.at(name).delete()

    def keep_only(self, names: Collection[str | None]) -> None:
        """Remove all but these, and the folder with the last."""
        for name in self.names():
            if name not in names:
                self.at(name).delete()
        if not self.names() and self._run.exists(FOLDER):
            self._run.filesystem.rm(self._run.file(FOLDER), recursive=True)

    def remove_unfinished(self) -> None:
        """Remove what a crash left half-written; for the one writer, before it starts."""
        for name in self.names():
            if not self.at(name).exists("manifest.json"):
                self.at(name).delete()


class BackgroundWriter:
    """Does one write at a time beside the training loop; a failure is raised at the loop's next call."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self._future: Future[Any] | None = None

    @property
    def is_busy(self) -> bool:
        return self._future is not None and not self._future.done()

    def start(self, write: Callable[[], Any]) -> None:
        """Wait for the write before, then start this one."""
        self.wait()
        self._future = self._executor.submit(write)

    def check(self) -> None:
        """Raise what the last write raised, if it is over."""
        if not self.is_busy:
            self.wait()

    def wait(self) -> None:
        future, self._future = self._future, None
        if future is not None:
            future.result()


@contextmanager
def named_errors(verb: str, artifact: Artifact) -> Iterator[None]:
    """Name the address in an error of the storage, which has been retried with backoff by then."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise OSError(f"Could not {verb} {artifact.url} after several tries: {error}") from error
