"""Of which sources prepared shards are, and in what shares.

for member in members_of(shards): member.name, member.share, member.shards
"""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.artifacts import Artifact

MIX = "mix"  # where a manifest's counts name the sources


@dataclass(frozen=True)
class Member:
    """One source of a mix, or the only source there is."""

    name: str  # empty if it is the only one
    share: float  # of the rows, and so of the tokens that a training reads
    shards: Artifact


def members_of(shards: Artifact) -> list[Member]:
    """Name the sources of a prepared mix, or the one source of other shards."""
    manifest = shards.manifest()
    if manifest is None:
        raise ValueError(f"{shards.url} is not finished; run the prepare stage first.")
    folder = posixpath.dirname(shards.url)
    return [
        Member(
            each["name"],
            each["share"],
            Artifact(posixpath.join(folder, f"prepare-{each['fingerprint']}"), "prepare", each["fingerprint"]),
        )
        for each in manifest.counts.get(MIX, ())
    ] or [Member("", 1.0, shards)]


def note_members(members: Sequence[Member]) -> list[dict[str, Any]]:
    """What the manifest of a mix says for `members_of`."""
    return [
        {"name": member.name, "share": member.share, "fingerprint": member.shards.fingerprint} for member in members
    ]


def bytes_per_target(members: Sequence[Member]) -> float:
    """Bytes of text that a target spells on average, in batches of these members."""
    targets = spelled = 0.0
    for member in members:
        manifest = member.shards.manifest()
        assert manifest is not None
        counts: Mapping[str, int] = manifest.counts["train"]
        learnt = "learnt_" if "learnt_tokens" in counts else ""
        targets += member.share * counts[f"{learnt}tokens"] / counts["tokens"]
        spelled += member.share * counts[f"{learnt}bytes"] / counts["tokens"]
    return spelled / targets
