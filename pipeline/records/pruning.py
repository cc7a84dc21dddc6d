"""Making room: what nothing needs goes, what was made from others before what it was made from.

    choice = choose(inventory, registered, Wish(older_than_days=30))     # shows; deletes nothing
    for outcome in prune(choice, registered_now): print(outcome)

Each pipeline's name is held while its artifacts go, so that none is begun or read by a run meanwhile, and what is to go
is looked at again under the lease. An artifact loses its manifest first: killed in the middle, a prune leaves folders
that are not done, and the next one takes them.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from pipeline import lease
from pipeline.artifacts import Artifact
from pipeline.records.inventory import (
    DONE,
    Inventory,
    Registered,
    Stored,
    bytes_freed,
    count_names,
    is_registered,
    take_inventory,
)
from pipeline.training.checkpoints import FOLDER as CHECKPOINTS


@dataclass(frozen=True)
class Wish:
    """Which artifacts may go, if nothing needs them; all that is said must hold."""

    older_than_days: float = 0.0
    keep: int = 0  # the newest done ones of each stage of each pipeline stay
    name: str = ""  # a pattern for <pipeline>, <folder> or <pipeline>/<folder>
    unfinished: bool = False  # only what is not done
    training_state: bool = False  # of finished trainings the checkpoints alone, not the model

    def __post_init__(self) -> None:
        if not (self.older_than_days >= 0 and self.keep >= 0):
            raise ValueError("An age in days and a number to keep are not below zero.")
        if not (self.older_than_days or self.keep or self.name or self.unfinished):
            raise ValueError("Say what may go: --older-than DAYS, --keep N, --name PATTERN or --unfinished.")


@dataclass(frozen=True)
class Choice:
    """What may go under a root, in the order in which it goes, and what stays although it was wished away."""

    storage: str
    wish: Wish
    going: Sequence[Stored]
    staying: Sequence[tuple[Stored, str]]  # with what needs it

    @property
    def bytes(self) -> int:
        return bytes_freed(self.going)


@dataclass(frozen=True)
class Outcome:
    """What became of one artifact, or of a pipeline whose name is held."""

    name: str
    bytes: int
    deleted: bool
    why: str = ""


def choose(
    inventory: Inventory,
    registered: Sequence[Registered],
    wish: Wish,
    *,
    among: Collection[str] | None = None,
    now: float | None = None,
) -> Choice:
    """Find what a wish lets go and nothing needs; `among` are the addresses that may go, if not all."""
    wished = {
        each.url: each
        for each in inventory.stored
        if (among is None or each.url in among) and _matches(each, inventory, wish, now)
    }
    if wish.training_state:
        parts = [_only_checkpoints(each) for each in wished.values()]
        return Choice(inventory.storage, wish, [part for part in parts if part is not None], [])
    doomed = {url: each for url, each in wished.items() if not is_registered(each, registered)}
    while True:
        needed = [url for url in doomed if any(other.url not in doomed for other in inventory.dependents[url])]
        if not needed:
            break
        for url in needed:
            del doomed[url]
    going: list[Stored] = []
    while doomed:  # what was made from others goes first
        free = [url for url in doomed if not any(other.url in doomed for other in inventory.dependents[url])]
        going += [doomed.pop(url) for url in free or list(doomed)]
    gone = {each.url for each in going}
    staying = [(each, ", ".join(inventory.needs[url])) for url, each in wished.items() if url not in gone]
    return Choice(inventory.storage, wish, going, staying)


def prune(choice: Choice, ask_registry: Callable[[], Sequence[Registered]]) -> Iterator[Outcome]:
    """Delete what was chosen, as far as it still may go; yields what became of each."""
    pipelines = dict.fromkeys(each.pipeline for each in choice.going)
    for pipeline in pipelines:
        chosen = [each for each in choice.going if each.pipeline == pipeline]
        try:
            with lease.hold(choice.storage, pipeline, f"a prune by {lease.describe_this_process()}") as held:
                yield from _prune_pipeline(choice, pipeline, chosen, held, ask_registry())
        except ValueError as error:
            yield Outcome(pipeline, 0, False, str(error))


def _prune_pipeline(
    choice: Choice, pipeline: str, chosen: Sequence[Stored], held: lease.Lease, registered: Sequence[Registered]
) -> Iterator[Outcome]:
    """Look again, now that nobody else writes here, and delete."""
    inventory = take_inventory(choice.storage, registered, pipeline)
    among = {each.url for each in chosen}  # what was not shown stays, and keeps what it was made from
    again = {each.url for each in choose(inventory, registered, choice.wish, among=among).going}
    for each in chosen:
        if each.url not in again:
            gone = each.url not in {found.url for found in inventory.stored}
            yield Outcome(each.name, 0, gone, "gone already" if gone else "needed by now, or younger")
            continue
        held.check()
        artifact = Artifact(each.url, each.stage, each.fingerprint)
        try:
            if choice.wish.training_state:
                filesystem, path = artifact.filesystem, artifact.file(CHECKPOINTS)
                if filesystem.exists(path):
                    filesystem.rm(path, recursive=True)
            else:
                artifact.delete()
        except FileNotFoundError:
            pass  # somebody deletes by hand as well
        yield Outcome(each.name, each.bytes, True)


def _matches(stored: Stored, inventory: Inventory, wish: Wish, now: float | None) -> bool:
    if stored.age_days(time.time() if now is None else now) < wish.older_than_days:
        return False
    if wish.name and not any(fnmatch(text, wish.name) for text in (stored.pipeline, stored.folder, stored.name)):
        return False
    if wish.unfinished and stored.state == DONE:
        return False
    alike = [
        each
        for each in inventory.stored
        if (each.pipeline, each.stage, each.state) == (stored.pipeline, stored.stage, DONE)
    ]
    newest = sorted(alike, key=lambda each: each.modified, reverse=True)[: wish.keep]
    return not wish.keep or stored.url not in {each.url for each in newest}


def _only_checkpoints(stored: Stored) -> Stored | None:
    """The part of a finished training that only going on with it needs; None where there is none."""
    if stored.stage != "train" or stored.state != DONE:
        return None
    artifact = Artifact(stored.url, stored.stage, stored.fingerprint)
    filesystem, path = artifact.filesystem, artifact.file(CHECKPOINTS)
    try:
        found = [entry for entry in filesystem.find(path, detail=True).values() if entry["type"] == "file"]
    except FileNotFoundError:
        return None
    if not found:
        return None
    size = sum(int(entry["size"]) for entry in found)
    return replace(stored, files=len(found), bytes=size, inodes=count_names(found))
