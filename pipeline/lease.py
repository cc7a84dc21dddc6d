"""Who works on a pipeline's name: one holder at a time, and the second is told who holds it.

    with lease.hold(config.storage, config.name):
        ...every stage that writes under <storage>/<name>/

On S3 it is an object, `lease.json`, taken with a conditional write and renewed every few seconds: a holder that
dies stops renewing, and the name is free a minute later. In a local folder it is a lock on that file, which the kernel
drops with its process.
"""

import errno
import getpass
import json
import os
import posixpath
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec
from filelock import BaseFileLock, FileLock, Timeout

from pipeline.artifacts import filesystem_of, resolve_storage

LEASE = "lease.json"
SECONDS = 60.0  # a lease that is not renewed for this long is nobody's
# Four chances to renew before it ends.
RENEW_SECONDS = 15.0


@dataclass(frozen=True)
class Holder:
    """Who holds a name, as the next one will read it."""

    who: str
    token: str  # tells this holding from every other
    since: float
    renewed: float

    def describe(self) -> str:
        return f"{self.who}, since {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(self.since))}"


class Lease:
    """A name that this process holds until `release()`, or until `check()` says that it was lost."""

    def __init__(self, storage: str, name: str, who: str | None = None) -> None:
        self.name = name
        self.url = posixpath.join(resolve_storage(storage), name, LEASE)
        now = time.time()
        self.holder = Holder(who or describe_this_process(), secrets.token_hex(8), now, now)
        self.is_lost = False
        self._etag = ""
        self._lock: BaseFileLock | None = None
        self._released = threading.Event()
        self._renewer: threading.Thread | None = None

    @property
    def _file(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return filesystem_of(self.url)

    @property
    def _is_local(self) -> bool:
        return "://" not in self.url

    def acquire(self) -> None:
        """Take the name; raises `ValueError` that says who has it."""
        if self._is_local:
            self._lock_file()
            return
        self._create_object()
        self._renewer = threading.Thread(target=self._keep_renewing, name=f"lease of {self.name}", daemon=True)
        self._renewer.start()

    def renew(self) -> None:
        """Say that the holder lives; marks the lease lost if another has taken it meanwhile."""
        if self._is_local or self.is_lost:
            return
        self.holder = Holder(self.holder.who, self.holder.token, self.holder.since, time.time())
        try:
            self._write(IfMatch=self._etag)
        except OSError as error:
            if not _is_condition(error):
                raise
            # Another holds it; or an earlier write of ours went through and its answer was lost.
            found, etag = self._read()
            if found is not None and found.token == self.holder.token:
                self._etag = etag
            else:
                self.is_lost = True

    def check(self) -> None:
        """Raise `ValueError` if the name was lost: storage was away for longer than a lease lasts."""
        if self.is_lost:
            found, _ = self._read()
            taker = found.describe() if found else "nobody any more"
            raise ValueError(
                f"This run lost the pipeline's name {self.name!r}: storage did not answer for over"
                f" {SECONDS:.0f} s, and {taker} has it now. Run it again when that one has ended."
            )

    def release(self) -> None:
        """Give the name back."""
        self._released.set()
        if self._renewer is not None:
            self._renewer.join(timeout=RENEW_SECONDS)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        elif not self._is_local and not self.is_lost:
            found, _ = self._read()
            if found is not None and found.token == self.holder.token:
                filesystem, path = self._file
                filesystem.rm_file(path)

    # A local folder: the lock belongs to the process, the content only says who it is.

    def _lock_file(self) -> None:
        path = Path(self.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(self._taken_by(_parse(path.read_bytes()))) from None
        path.write_bytes(self._content())
        self._lock = lock

    # S3: whoever creates the object, or replaces exactly the stale one that it has seen, holds the name.

    def _create_object(self) -> None:
        try:
            self._write(mode="create")
            return
        except FileExistsError:
            pass
        found, etag = self._read()
        if found is not None and found.token == self.holder.token:  # our own write, told twice
            self._etag = etag
            return
        if found is not None and time.time() - found.renewed < SECONDS:
            raise ValueError(self._taken_by(found))
        try:
            self._write(IfMatch=etag) if etag else self._write(mode="create")
        except OSError as error:
            if not _is_condition(error):
                raise
            winner, _ = self._read()
            raise ValueError(self._taken_by(winner)) from None

    def _keep_renewing(self) -> None:
        while not self._released.wait(RENEW_SECONDS) and not self.is_lost:
            try:
                self.renew()
            except Exception:
                continue  # storage is away: the next round tries again, until another holder has taken the name

    def _content(self) -> bytes:
        return json.dumps(asdict(self.holder), indent=1).encode() + b"\n"

    def _write(self, **condition: str) -> None:
        filesystem, path = self._file
        answer = filesystem.pipe_file(path, self._content(), **condition)
        self._etag = answer["ETag"]

    def _read(self) -> tuple[Holder | None, str]:
        filesystem, path = self._file
        try:
            etag = filesystem.info(path)["ETag"]
            return _parse(filesystem.cat_file(path)), etag
        except FileNotFoundError:
            return None, ""

    def _taken_by(self, holder: Holder | None) -> str:
        who = holder.describe() if holder else "another process"
        rest = "Wait until it ends, or choose another name (name=…)."
        if holder is not None and not self._is_local:
            age = max(0.0, time.time() - holder.renewed)
            rest += f" It was last heard of {age:.0f} s ago; {SECONDS:.0f} s after the last word the name is free."
        return f"The pipeline {self.name!r} is being run by {who}. {rest}"


@contextmanager
def hold(storage: str, name: str, who: str | None = None) -> Iterator[Lease]:
    """Hold a pipeline's name while the block runs."""
    lease = Lease(storage, name, who)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def describe_this_process() -> str:
    """Name this process for another person: user, machine, and the Ray job if it is one."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        user = f"user {os.getuid()}"
    who = f"{user} on {socket.gethostname()} (process {os.getpid()})"
    try:
        job = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"]
    except (KeyError, TypeError, ValueError):
        return who
    return f"job {job}, {who}"


def _parse(content: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(content))
    except (TypeError, ValueError):
        return None  # half-written, or somebody else's file


def _is_condition(error: OSError) -> bool:
    return isinstance(error, FileExistsError) or error.errno == errno.EINVAL or "ConditionalRequest" in str(error)
