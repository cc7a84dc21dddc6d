"""What lies under a storage root: every artifact, its size and age, what it was made from, and what needs it.

    inventory = take_inventory(storage, registered)
    for stored in inventory.stored: stored.name, stored.bytes, inventory.needs[stored.url]

One listing of the root and one small read for each artifact; nothing is written.
"""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipeline.artifacts import MANIFEST, Manifest, filesystem_of, resolve_storage
from pipeline.corpus.members import MIX
from pipeline.stages import STAGES

RUN_FILE = "run.json"  # an unfinished training's note, see pipeline/train.py
# Beside the stages': weights to start from, and searches.
KINDS = (*STAGES, "start", "search")
FOLDER = re.compile(rf"({'|'.join(KINDS)})-(.+)")
OF_OTHERS = ("mlflow", "cluster")  # folders of the root that are no pipeline's
DONE, UNFINISHED, DAMAGED = "done", "unfinished", "damaged"


@dataclass(frozen=True)
class Inode:
    """A file of a disk, which may have several names: weights are linked, not copied."""

    bytes: int
    names_here: int  # that were found
    names: int  # that it has anywhere


@dataclass(frozen=True)
class Stored:
    """One artifact's folder as it lies there, done or not."""

    url: str
    pipeline: str
    folder: str  # such as train-3f2a91c0…
    stage: str
    fingerprint: str
    state: str
    files: int
    bytes: int  # a file that lies in several artifacts of a disk under one inode counts in each
    modified: float  # Unix time of the newest file
    inputs: Mapping[str, str] = field(default_factory=dict)  # name of the input -> its fingerprint
    knows_inputs: bool = True
    run_id: str = ""  # in MLflow
    counts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    inodes: Mapping[int, "Inode"] = field(default_factory=dict)  # of a disk; of S3 none

    @property
    def name(self) -> str:
        return f"{self.pipeline}/{self.folder}"

    def age_days(self, now: float | None = None) -> float:
        return max(0.0, (time.time() if now is None else now) - self.modified) / 86_400


@dataclass(frozen=True)
class Registered:
    """A version of MLflow's registry, and which artifacts it names."""

    label: str  # such as demo version 3 (champion)
    names: frozenset[str]  # <pipeline>/<folder>, wherever the root lay when it was registered
    fingerprints: frozenset[str]


@dataclass(frozen=True)
class Inventory:
    """All that was found under a root."""

    storage: str
    stored: Sequence[Stored]
    needs: Mapping[str, Sequence[str]]  # url -> what needs it, in words
    dependents: Mapping[str, Sequence[Stored]]  # url -> the artifacts that were made from it
    others: Mapping[str, int]  # what else lies in the root -> bytes

    def find(self, name: str) -> Stored:
        """The artifact of that name or address. Raises `ValueError` that says what there is."""
        found = [each for each in self.stored if name.rstrip("/") in (each.name, each.folder, each.url)]
        if not found:  # the beginning of a fingerprint, as of a commit
            found = [each for each in self.stored if each.folder.startswith(name) or each.name.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            told = ", ".join(each.name for each in found[:5])
            raise ValueError(f"{name!r} can be any of {told}; write more of it.")
        there = ", ".join(each.name for each in self.stored[:5]) or "nothing"
        raise ValueError(f"{self.storage} holds no artifact {name!r}; it holds {there}.")


def take_inventory(storage: str, registered: Iterable[Registered] = (), pipeline: str | None = None) -> Inventory:
    """List a root, or one pipeline of it. Raises `ValueError` where there is no such folder."""
    storage = resolve_storage(storage)
    if pipeline is not None and (pipeline in ("", ".", "..") or "/" in pipeline):
        raise ValueError(f"{pipeline!r} is no name of a pipeline.")
    filesystem, root = filesystem_of(storage)
    start = root if pipeline is None else f"{root}/{pipeline}"
    if "://" not in storage and not filesystem.isdir(start):
        raise ValueError(f"There is no folder {start}; storage=… names another.")
    try:
        listing = filesystem.find(start, detail=True)
    except FileNotFoundError:
        listing = {}
    folders: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    others: dict[str, int] = {}
    for path, entry in listing.items():
        parts = path[len(root) + 1 :].split("/")
        if entry["type"] != "file" or path.endswith("/") or entry.get("islink"):
            continue  # a link's target lies elsewhere
        if len(parts) > 2 and parts[0] not in OF_OTHERS and not parts[0].startswith("."):
            folders.setdefault((parts[0], parts[1]), {})["/".join(parts[2:])] = entry
        else:
            others[parts[0]] = others.get(parts[0], 0) + int(entry["size"])
    notes = _read_notes(filesystem, root, folders)
    stored = []
    for (name, folder), files in folders.items():
        found = _describe(f"{storage}/{name}/{folder}", name, folder, files, notes)
        if found is None:
            others[name] = others.get(name, 0) + sum(int(entry["size"]) for entry in files.values())
        else:
            stored.append(found)
    stored.sort(key=lambda each: (each.pipeline, _place(each.stage), each.modified))
    dependents = _find_dependents(stored)
    needs = _find_needs(stored, dependents, registered)
    return Inventory(storage, stored, needs, dependents, others)


def is_registered(stored: Stored, registered: Iterable[Registered]) -> bool:
    return any(stored.name in each.names or stored.fingerprint in each.fingerprints for each in registered)


def _read_notes(filesystem: Any, root: str, folders: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, bytes]:
    """Read every artifact's manifest and every training's note at once; what vanishes meanwhile is left out."""
    wanted = [
        f"{root}/{name}/{folder}/{file}"
        for (name, folder), files in folders.items()
        for file in (MANIFEST, RUN_FILE)
        if file in files
    ]
    return dict(filesystem.cat(wanted, on_error="omit")) if wanted else {}


def _describe(
    url: str, pipeline: str, folder: str, files: Mapping[str, Mapping[str, Any]], notes: Mapping[str, bytes]
) -> Stored | None:
    """Say what a folder is, or None where it is no artifact of ours."""
    path = filesystem_of(url)[1]
    note, manifest, state = notes.get(f"{path}/{RUN_FILE}"), None, UNFINISHED
    if MANIFEST in files and f"{path}/{MANIFEST}" in notes:
        try:
            manifest = Manifest.from_json(notes[f"{path}/{MANIFEST}"].decode("utf-8", errors="replace"), url)
            state = DONE
        except ValueError:
            state = DAMAGED
    named = FOLDER.fullmatch(folder)
    if named is None and manifest is None:
        return None
    known: dict[str, Any] = {}
    if manifest is None and note is not None:
        try:
            known = dict(json.loads(note))
        except ValueError:
            state = DAMAGED
    counts = manifest.counts if manifest is not None else {}
    inputs = dict(manifest.inputs if manifest is not None else known.get("inputs", {}))
    for place, member in enumerate(counts.get(MIX) or ()):
        inputs[f"source {place + 1}"] = str(member["fingerprint"])
    stage = manifest.stage if manifest is not None else (named[1] if named else "")
    fallback = named[2] if named else folder
    return Stored(
        url=url,
        pipeline=pipeline,
        folder=folder,
        stage=stage,
        fingerprint=manifest.fingerprint if manifest is not None else str(known.get("fingerprint", fallback)),
        state=state,
        files=len(files),
        bytes=sum(int(entry["size"]) for entry in files.values()),
        modified=max(_time_of(entry) for entry in files.values()),
        inputs=inputs,
        knows_inputs=manifest is not None or "inputs" in known,
        run_id=str(counts.get("mlflow_run_id") or known.get("mlflow_run_id") or ""),
        counts=counts,
        settings=manifest.settings if manifest is not None else known.get("settings", {}),
        inodes=count_names(files.values()),
    )


def count_names(entries: Iterable[Mapping[str, Any]]) -> dict[int, Inode]:
    """The files among a listing's entries that a disk knows by an inode."""
    inodes: dict[int, Inode] = {}
    for entry in entries:
        if "ino" in entry:
            before = inodes.get(entry["ino"])
            names_here = 1 if before is None else before.names_here + 1
            inodes[entry["ino"]] = Inode(int(entry["size"]), names_here, int(entry.get("nlink", 1)))
    return inodes


def bytes_freed(going: Iterable[Stored]) -> int:
    """What is freed when all of these go: a file of a disk counts where it loses its last name."""
    freed, inodes = 0, dict[int, Inode]()
    for each in going:
        freed += 0 if each.inodes else each.bytes
        for number, inode in each.inodes.items():
            before = inodes.get(number)
            names_here = inode.names_here + (0 if before is None else before.names_here)
            inodes[number] = Inode(inode.bytes, names_here, inode.names)
    return freed + sum(inode.bytes for inode in inodes.values() if inode.names_here >= inode.names)


def _time_of(entry: Mapping[str, Any]) -> float:
    found = entry.get("mtime", entry.get("LastModified", 0.0))
    return found.timestamp() if isinstance(found, datetime) else float(found)


def _place(stage: str) -> int:
    return KINDS.index(stage) if stage in KINDS else len(KINDS)


def _find_dependents(stored: Sequence[Stored]) -> dict[str, list[Stored]]:
    """Which artifacts were made from which; one that does not say may have been made from any before it."""
    dependents: dict[str, list[Stored]] = {each.url: [] for each in stored}
    by_fingerprint: dict[tuple[str, str], list[Stored]] = defaultdict(list)
    by_stage: dict[tuple[str, str], list[Stored]] = defaultdict(list)
    for each in stored:
        by_fingerprint[each.pipeline, each.fingerprint].append(each)
        by_stage[each.pipeline, each.stage].append(each)
    for each in stored:
        made_from = [by_fingerprint.get((each.pipeline, fingerprint), ()) for fingerprint in each.inputs.values()]
        if not each.knows_inputs:
            made_from += [by_stage.get((each.pipeline, stage), ()) for stage in STAGES.get(each.stage, ())]
        for url in dict.fromkeys(other.url for found in made_from for other in found if other is not each):
            dependents[url].append(each)
    return dependents


def _find_needs(
    stored: Sequence[Stored], dependents: Mapping[str, Sequence[Stored]], registered: Iterable[Registered]
) -> dict[str, list[str]]:
    """What needs each artifact, by its URL: versions of the registry, then the folders made from it."""
    labels: dict[str, dict[int, str]] = defaultdict(dict)  # a name or a fingerprint -> labels, in their order
    for number, version in enumerate(registered):
        for key in (*version.names, *version.fingerprints):
            labels[key][number] = version.label
    needs = {}
    for each in stored:
        versions = labels.get(each.name, {}) | labels.get(each.fingerprint, {})
        needs[each.url] = [
            *(versions[number] for number in sorted(versions)),
            *(other.folder for other in dependents[each.url]),
        ]
    return needs


def describe_origin(stored: Stored) -> str:
    """What it came from, in a few words."""
    return ", ".join(f"{name} {fingerprint[:8]}" for name, fingerprint in stored.inputs.items())


def describe_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def describe_age(days: float) -> str:
    if days >= 1:
        return f"{days:.0f} d"
    return f"{24 * days:.0f} h" if days * 24 >= 1 else f"{24 * 60 * days:.0f} min"
