"""Which documents to leave out, each rule off by default and counted by its reason."""

from pipeline.artifacts import Artifact
from pipeline.config import PrepareConfig

TOO_SHORT, TOO_LONG, LOW_QUALITY = "too short", "too long", "low quality"


def reason_to_drop(text: str, settings: PrepareConfig) -> str:
    """Judge one document by itself; the reason, or empty to keep it."""
    if len(text) < settings.min_characters:
        return TOO_SHORT
    if settings.max_characters and len(text) > settings.max_characters:
        return TOO_LONG
    return ""


def load_duplicates(output: Artifact, folder: str, unit: str) -> dict[int, str]:
    """Return why which documents of a unit are duplicates, by their position in it."""
    raise NotImplementedError
