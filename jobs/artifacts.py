"""Say what lies in storage and what needs it, and delete what nothing needs.

    python -m jobs.artifacts list  [storage=s3://bucket/prefix] [--name demo] [--json]
    python -m jobs.artifacts show  train-3f2a91
    python -m jobs.artifacts prune --older-than 30 [--keep 3] [--name 'demo*'] [--unfinished] [--training-state] [--yes]

Needed is what another artifact was made from, and what a version of MLflow's registry names; a pipeline that runs keeps
all of its own. `prune` shows what it would free, and deletes with --yes. Several of its conditions must all hold.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.command import make_parser, print_json, run_plainly, set_environment

if TYPE_CHECKING:
    from pipeline.records.inventory import Inventory, Stored


def look(options: argparse.Namespace) -> "tuple[Inventory, Any]":
    """List the root and ask the registry."""
    from pipeline.config import load_config
    from pipeline.records.inventory import take_inventory
    from pipeline.records.versions import read_registered

    config = load_config(None, options.settings)
    registered = read_registered(config)
    return take_inventory(config.storage, registered, getattr(options, "name", "") or None), config


def list_artifacts(options: argparse.Namespace) -> None:
    from pipeline.records.inventory import bytes_freed, describe_age, describe_bytes, describe_origin

    inventory, _ = look(options)
    if options.json:
        print_json([describe(each, inventory) for each in inventory.stored])
        return
    print(f"{inventory.storage}\n")
    print(f"{'artifact':<42}{'size':>10}{'age':>9}  {'state':<11}{'needed by':<44}made from")
    for each in inventory.stored:
        needs = inventory.needs[each.url]
        needed = (needs[0] + (f" and {len(needs) - 1} more" if len(needs) > 1 else "")) if needs else "-"
        print(
            f"{each.name:<42}{describe_bytes(each.bytes):>10}{describe_age(each.age_days()):>9}  {each.state:<11}"
            f"{needed:<44}{describe_origin(each)}"
        )
    for name, size in inventory.others.items():
        told = "MLflow's own files; `mlflow gc` deletes those of deleted runs" if name == "mlflow" else "not artifacts"
        print(f"{name:<42}{describe_bytes(size):>10}{'':>9}  {told}")
    print(f"\n{len(inventory.stored)} artifacts, {describe_bytes(bytes_freed(inventory.stored))} that lie nowhere else")


def show_artifact(options: argparse.Namespace) -> None:
    from pipeline.records.inventory import describe_age, describe_bytes

    inventory, _ = look(options)
    each = inventory.find(options.artifact)
    if options.json:
        print_json(describe(each, inventory) | {"counts": each.counts, "settings": each.settings})
        return
    print(f"{each.url}\n")
    print(f"stage          {each.stage}, {each.state}")
    print(f"size           {describe_bytes(each.bytes)} in {each.files:,} files")
    print(f"age            {describe_age(each.age_days())}")
    print(f"MLflow run     {each.run_id or '-'}")
    known = {other.fingerprint: other for other in inventory.stored if other.pipeline == each.pipeline}
    for name, fingerprint in each.inputs.items():
        other = known.get(fingerprint)
        there = other.name if other is not None else fingerprint if name == "source" else f"{fingerprint}, not there"
        print(f"made from      {name}: {there}")
    for need in inventory.needs[each.url] or ["nothing: it may be pruned"]:
        print(f"needed by      {need}")
    for title, rows in (("counts", each.counts), ("settings", each.settings)):
        print(f"\n{title}")
        for key, value in rows.items():
            print(f"  {key:<34} {value if len(str(value)) < 100 else f'{str(value)[:97]}…'}")


def prune(options: argparse.Namespace) -> int:
    from pipeline.records import pruning
    from pipeline.records.inventory import describe_age, describe_bytes
    from pipeline.records.versions import read_registered

    wish = pruning.Wish(
        older_than_days=options.older_than,
        keep=options.keep,
        name=options.pattern,
        unfinished=options.unfinished,
        training_state=options.training_state,
    )
    inventory, config = look(options)
    choice = pruning.choose(inventory, read_registered(config), wish)
    if not options.json:
        for each in choice.going:
            part = f"{each.name}/checkpoints" if wish.training_state else each.name
            print(f"  {part:<50}{describe_bytes(each.bytes):>10}{describe_age(each.age_days()):>9}  {each.state}")
        for each, needs in choice.staying:
            print(f"  {each.name:<50}{'stays':>10}{describe_age(each.age_days()):>9}  {needs}")
    if not options.yes:
        if options.json:
            print_json({"bytes": choice.bytes, "would_delete": [describe(each, inventory) for each in choice.going]})
        elif choice.going:
            print(f"\n{len(choice.going)} would go, {describe_bytes(choice.bytes)}; add --yes to delete them.")
        else:
            print("Nothing is to go.")
        return 0
    outcomes = []
    for outcome in pruning.prune(choice, lambda: read_registered(config)):
        outcomes.append(outcome)
        if not options.json:
            print(f"  {'deleted' if outcome.deleted else 'kept':<8}{outcome.name}  {outcome.why}".rstrip(), flush=True)
    if options.json:
        print_json([asdict(outcome) for outcome in outcomes])
    else:
        deleted = sum(outcome.deleted for outcome in outcomes)
        print(f"{deleted} of {len(choice.going)} deleted.")
    return 0 if all(outcome.deleted for outcome in outcomes) else 1


def describe(stored: "Stored", inventory: "Inventory") -> dict[str, Any]:
    """What another program wants to know of an artifact."""
    names = ("url", "pipeline", "folder", "stage", "fingerprint", "state", "files", "bytes", "inputs", "run_id")
    return {name: getattr(stored, name) for name in names} | {
        "modified_unix_seconds": stored.modified,
        "needed_by": list(inventory.needs[stored.url]),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|show|prune")
    found: dict[str, argparse.ArgumentParser] = {}
    for verb, meaning in (
        ("list", "every artifact, its size, age and state, and what needs it"),
        ("show", "one artifact: what it came from, what needs it, what it counted"),
        ("prune", "what nothing needs, and with --yes delete it"),
    ):
        found[verb] = verbs.add_parser(verb, help=meaning, description=meaning, allow_abbrev=False)
    found["show"].add_argument("artifact", help="its folder, such as train-3f2a91c0, or the beginning of that")
    for each in found.values():
        each.add_argument("settings", nargs="*", metavar="storage=…", help="the storage root [artifacts]")
        each.add_argument("--json", action="store_true", help="print JSON, for another program")
    found["list"].add_argument("--name", default="", help="one pipeline's only")
    wishes = found["prune"]
    wishes.add_argument("--older-than", type=float, default=0.0, metavar="DAYS", help="since its last file")
    wishes.add_argument("--keep", type=int, default=0, metavar="N", help="but the newest N of each stage")
    wishes.add_argument("--name", dest="pattern", default="", metavar="PATTERN", help="such as demo or 'demo/train-*'")
    wishes.add_argument("--unfinished", action="store_true", help="what was begun and not finished")
    wishes.add_argument(
        "--training-state", action="store_true", help="of finished trainings only what going on with them needs"
    )
    wishes.add_argument("--yes", action="store_true", help="delete it")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    set_environment()
    do = {"list": list_artifacts, "show": show_artifact, "prune": prune}[options.verb]
    return run_plainly(lambda: do(options))


if __name__ == "__main__":
    sys.exit(main())
