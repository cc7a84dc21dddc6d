"""Where weights to start from can lie: a folder here or on s3://, a repository of the hub, a version of the registry.

origin = open_origin("hf://HuggingFaceTB/SmolLM2-135M", config)     # asks what the name means now
origin.name                                                         # hf://HuggingFaceTB/SmolLM2-135M@<commit>
with origin.folder() as folder: ...                                 # the files that matter, on this machine
"""

import hashlib
import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from model.checkpoint import INDEX
from model.vocabulary import FILES
from pipeline.artifacts import Artifact, expand_home, filesystem_of, record_file
from pipeline.config import Config

# What a start's folder holds beside its weights: what it says of itself, its tokenizer and how it talks.
CONFIG = "config.json"
TOKENIZER_FILES = (*FILES, "tokenizer.model", "spiece.model")  # those two cannot be read, which is said
SMALL_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES)
WEIGHT_FILES = ("model*.safetensors", INDEX)
# A pickle is never fetched; that it is there says why a folder has no weights that can be read.
PICKLES = ("pytorch_model*.bin",)

HUB = re.compile(r"hf://((?:[\w.-]+/)?[\w.-]+)(?:@([\w./-]+))?/?")
REGISTRY = re.compile(r"models:/([^/@]+)(?:@([\w-]+)|/(\d+))")
COMMIT = re.compile(r"[0-9a-f]{40}")


class Origin(Protocol):
    """A place that holds a Hugging Face folder."""

    @property
    def name(self) -> str:
        """What was meant, in words that will never mean anything else; of a folder its absolute path."""

    @property
    def run_id(self) -> str:
        """The MLflow run that trained it, where that is known."""

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file that matters."""

    def small_files(self) -> Any:
        """A context with a local folder that holds all of them but the weights."""

    def folder(self) -> Any:
        """A context with a local folder that holds all of them."""


def open_origin(name: str, config: Config) -> Origin:
    """Find out what a name means now. Raises `ValueError` with one sentence where it leads nowhere."""
    if name.startswith("hf://"):
        found = HUB.fullmatch(name)
        if found is None:
            raise ValueError(f"start.model is {name!r}; write hf://owner/name or hf://owner/name@revision.")
        return open_repository(found[1], found[2] or "main")
    if name.startswith("models:"):
        found = REGISTRY.fullmatch(name)
        if found is None:
            raise ValueError(f"start.model is {name!r}; write models:/name@alias or models:/name/version.")
        return open_version(found[1], found[2] or found[3], config)
    return open_folder(name)


def is_folder(name: str) -> bool:
    """Whether a name is a place whose content can change, and not a version or a commit."""
    return not name.startswith(("hf://", "models:"))


def matters(name: str) -> bool:
    return name in SMALL_FILES or any(fnmatch(name, pattern) for pattern in WEIGHT_FILES)


# A folder -------------------------------------------------------------------------------------------------------------


def open_folder(name: str) -> "Folder":
    if "://" in name and not name.startswith(("s3://", "file://")):
        raise ValueError(
            f"start.model is {name!r}; it can be a folder, local or s3://, hf://owner/name or models:/name@alias."
        )
    where = name.removeprefix("file://")
    if "://" not in where:
        where = str(expand_home(where).resolve())
    folder = Folder(where.rstrip("/"))
    try:
        listing = folder.listing
    except (FileNotFoundError, NotADirectoryError):
        listing = {}
    except PermissionError as error:
        raise ValueError(f"start.model={name} may not be read ({error}).") from None
    if CONFIG not in listing:
        hub = f" For a model of the hub write hf://{name}." if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        there = "holds no config.json" if listing else "is not there"
        raise ValueError(f"start.model={name} {there}; name a Hugging Face folder.{hub}")
    return folder


@dataclass(frozen=True)
class Folder:
    """A folder on this machine or on S3."""

    name: str

    @property
    def run_id(self) -> str:
        """The checkpoint of one of our own trainings lies beside its manifest."""
        try:
            manifest = Artifact(posixpath.dirname(self.name), "train", "").any_manifest()
        except (ValueError, OSError):
            return ""
        return str(manifest.counts.get("mlflow_run_id", "")) if manifest is not None else ""

    @cached_property
    def listing(self) -> dict[str, list[Any]]:
        """Each file that matters, with its size and what tells this version of it from another."""
        filesystem, path = filesystem_of(self.name)
        entries = {posixpath.basename(entry["name"]): entry for entry in filesystem.ls(path, detail=True)}
        return {
            name: [entry["size"], str(entry.get("ETag") or entry.get("mtime") or "")]
            for name, entry in sorted(entries.items())
            if entry["type"] != "directory" and (matters(name) or any(fnmatch(name, each) for each in PICKLES))
        }

    @property
    def names(self) -> list[str]:
        return [name for name in self.listing if matters(name)]

    def digests(self) -> dict[str, str]:
        filesystem, path = filesystem_of(self.name)
        found = {}
        for name in self.names:
            with filesystem.open(posixpath.join(path, name), "rb") as handle:
                found[name] = hashlib.file_digest(handle, "sha256").hexdigest()
        return found

    @contextmanager
    def small_files(self) -> Iterator[Path]:
        with self._fetched([name for name in self.names if name in SMALL_FILES]) as folder:
            yield folder

    @contextmanager
    def folder(self) -> Iterator[Path]:
        with self._fetched(self.names) as folder:
            yield folder

    @contextmanager
    def _fetched(self, names: Sequence[str]) -> Iterator[Path]:
        filesystem, path = filesystem_of(self.name)
        if "://" not in self.name:
            yield Path(path)
            return
        with tempfile.TemporaryDirectory(prefix="start-") as folder:
            for name in names:
                filesystem.get_file(posixpath.join(path, name), str(Path(folder) / name))
            yield Path(folder)


# The hub --------------------------------------------------------------------------------------------------------------


def open_repository(repository: str, revision: str) -> Origin:
    """Pin a revision to the commit that it is now; without the hub, to the one that its cache on this machine holds."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    asked = f"hf://{repository}@{revision}"
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except GatedRepoError:
        raise ValueError(
            f"start.model={asked} is for those whom its owners let in: accept its terms on the hub, set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"The hub has no model {repository!r}, or shows it to others only; check its name, or set HF_TOKEN."
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"The model {repository!r} has no revision {revision!r} on the hub.") from None
    except Exception as error:  # no network, an outage, a token that has run out
        patterns = [*SMALL_FILES, *WEIGHT_FILES]
        try:
            cached = snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=patterns)
        except Exception:
            raise ValueError(
                f"The hub has no answer for {repository!r} at {revision!r} ({type(error).__name__}); check the network"
                f" and HF_TOKEN, or name a folder that holds the model in start.model."
            ) from None
        return CachedRepository(f"hf://{repository}@{Path(cached).name}", Folder(cached))
    files = {
        sibling.rfilename: None if sibling.lfs is None else str(sibling.lfs.sha256)
        for sibling in info.siblings or ()
        if matters(sibling.rfilename)
    }
    if CONFIG not in files:
        raise ValueError(f"start.model={asked} holds no config.json; it is not a model of transformers.")
    return Repository(repository, str(info.sha), files)


@dataclass(frozen=True)
class Repository:
    """A model of the hub at one commit."""

    repository: str
    commit: str
    files: Mapping[str, str | None]  # each file that matters -> its SHA-256, which the hub knows of large ones
    run_id: str = ""

    @property
    def name(self) -> str:
        return f"hf://{self.repository}@{self.commit}"

    def digests(self) -> dict[str, str]:
        folder = self._fetch([name for name, digest in self.files.items() if digest is None])
        return {name: digest or record_file(folder / name).sha256 for name, digest in sorted(self.files.items())}

    @contextmanager
    def small_files(self) -> Iterator[Path]:
        yield self._fetch([name for name in self.files if name in SMALL_FILES])

    @contextmanager
    def folder(self) -> Iterator[Path]:
        yield self._fetch(list(self.files))

    def _fetch(self, names: Sequence[str]) -> Path:
        """Have files in the hub's cache on this machine, which is shared with everything else that reads the hub."""
        from huggingface_hub import snapshot_download

        try:
            found = snapshot_download(self.repository, revision=self.commit, allow_patterns=list(names))
        except Exception as error:
            raise ValueError(
                f"{self.name} could not be downloaded ({type(error).__name__}); check the network and HF_TOKEN, and"
                f" run the same command again."
            ) from None
        return Path(found)


@dataclass(frozen=True)
class CachedRepository:
    """A model of the hub as the cache on this machine holds it."""

    name: str
    cache: Folder
    run_id: str = ""

    def digests(self) -> dict[str, str]:
        return self.cache.digests()

    def small_files(self) -> Any:
        return self.cache.small_files()

    def folder(self) -> Any:
        return self.cache.folder()


# The registry ---------------------------------------------------------------------------------------------------------


def open_version(name: str, selector: str, config: Config) -> "Version":
    from pipeline import registry, tracking

    uri = tracking.address(config)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():  # to look makes no store
        raise ValueError(
            f"start.model is a version of {name!r}, and there is no registry at {uri}; train and register that model"
            f" with this storage first, or set MLFLOW_TRACKING_URI to the server that has it."
        )
    tracking.connect(config)
    return Version(registry.resolve(name, selector))


def registry_words(error: Exception) -> str:
    """Why the registry or its storage did not give a file, without addresses that may hold a password."""
    from pipeline import tracking

    return tracking.first_line(error).rstrip(".")


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    record: Any  # a registry.VersionRecord, whose module takes seconds to import
    _kept: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="start-"), compare=False, repr=False
    )

    @property
    def name(self) -> str:
        return f"models:/{self.record.name}/{self.record.version}"

    @property
    def run_id(self) -> str:
        return str(self.record.run_id)

    @cached_property
    def _downloaded(self) -> Folder:
        from mlflow.exceptions import MlflowException

        from pipeline import registry

        try:
            return Folder(str(registry.download(self.record, Path(self._kept.name))))
        except (MlflowException, OSError) as error:
            raise ValueError(f"The files of {self.name} cannot be read ({registry_words(error)}).") from None

    def digests(self) -> dict[str, str]:
        return self._downloaded.digests()

    def small_files(self) -> Any:
        return self._downloaded.small_files()

    def folder(self) -> Any:
        return self._downloaded.folder()
