"""How a setting is declared: a dataclass field with its default and the one line that `--help` prints."""

from dataclasses import field
from typing import Any


def setting(default: Any, meaning: str, *, affects_result: bool = True, added_later: bool = False) -> Any:
    """Declare a field; `affects_result=False` keeps it out of fingerprints, so that changing it re-runs nothing.

    `added_later=True` keeps it out while it holds its default: what was made before the setting existed was made with
    that, and is still found.
    """
    metadata = {"meaning": meaning, "affects_result": affects_result, "added_later": added_later}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    """Raise `ValueError` with one sentence for the person who wrote the setting."""
    if not condition:
        raise ValueError(message)
