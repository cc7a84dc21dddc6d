"""What of the input does not reach the shards, said on the screen: documents by reason, files by ending."""

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pipeline.corpus import cleaning, contamination
from pipeline.corpus.files import Listing, count_endings
from pipeline.corpus.formats import REPLACED, Document

EMPTY = "empty"
# What somebody asked for with a setting; the other reasons are faults of the input.
ASKED_FOR = (cleaning.TOO_SHORT, cleaning.TOO_LONG, cleaning.LOW_QUALITY, cleaning.EXACT, cleaning.NEAR)


def is_asked_for(reason: str) -> bool:
    return reason in ASKED_FOR or reason.startswith(contamination.REASON)


MOST_LOST = 0.05  # share of the documents, or of the files, from which on a warning is due
MOST_ASKED_FOR = 0.5
LEAST_VALIDATION_DOCUMENTS = 10


@dataclass
class Omissions:
    """How many documents were kept, dropped by reason, and kept with replaced characters."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    replaced: int = 0

    def count(self, document: Document) -> None:
        """Count a document as it was read."""
        text, note = document
        if text is None:
            self.dropped[note] += 1
        elif not text.strip():
            self.dropped[EMPTY] += 1
        else:
            self.kept += 1
            self.replaced += note == REPLACED

    @property
    def read(self) -> int:
        return self.kept + self.dropped.total()

    def reasons(self, listing: Listing) -> str:
        """Write in one line what was dropped, replaced and not read; empty where nothing was."""
        parts = [f"dropped {self.dropped.total():,}: {count_reasons(self.dropped)}"] if self.dropped else []
        if self.replaced:
            parts.append(f"{self.replaced:,} kept with characters replaced that are not valid UTF-8")
        if listing.ignored:
            parts.append(f"files not read: {count_endings(listing.ignored)}")
        return "; ".join(parts)

    def warnings(self, listing: Listing) -> list[str]:
        """Return a sentence for each kind of loss that somebody should look at before training."""
        found = []
        lost = sum(count for reason, count in self.dropped.items() if not is_asked_for(reason)) + self.replaced
        if lost > MOST_LOST * self.read:
            found.append(
                f"{lost / self.read:.1%} of the documents were lost or have replaced characters"
                f" ({self.reasons(Listing())}). Look at the source before you train on the rest."
            )
        unread, files = sum(listing.ignored.values()), len(listing.files)
        if unread > MOST_LOST * (unread + files):
            found.append(
                f"{unread:,} of {unread + files:,} files were not read, because of their endings:"
                f" {count_endings(listing.ignored)}."
            )
        for reason in filter(is_asked_for, sorted(self.dropped)):
            if self.dropped[reason] > MOST_ASKED_FOR * self.read:
                why = " prepare.quality_filter knows English prose alone." if reason == cleaning.LOW_QUALITY else ""
                found.append(f"{self.dropped[reason] / self.read:.1%} of the documents were dropped: {reason}.{why}")
        return found


def count_reasons(dropped: Mapping[str, int]) -> str:
    """Write reasons with their numbers of documents, the most frequent first: '20 not JSON, 6 empty'."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items(), key=lambda row: (-row[1], row)))


def warn(stage: str, warnings: Iterable[str]) -> None:
    """Print warnings so that they are seen among other lines."""
    for sentence in warnings:
        print(f"{stage:<9} WARNING: {sentence}", file=sys.stderr, flush=True)


def warn_of_share(held_out: int, documents: int, asked: float) -> list[str]:
    """Return a sentence where chance does not explain how many documents are held out; too few tell nothing."""
    expected = documents * asked
    if min(expected, documents - expected) < 10 or held_out == 0:
        return []
    if abs(held_out - expected) <= 6 * math.sqrt(expected * (1 - asked)):
        return []
    share = held_out / documents
    fraction = asked * asked / share
    advice = f" For {asked:.2%} set prepare.validation_fraction={fraction:.2g}." if fraction < 1 else ""
    return [
        f"{held_out:,} of {documents:,} documents ({share:.2%}) are held out, where prepare.validation_fraction asks"
        f" for {asked:.2%}. The SHA-256 of a document's text decides, so this text was itself chosen by it, or repeats"
        f" documents.{advice}"
    ]
