"""How a setting is declared, a dataclass field with the one line that `--help` prints, and how its value is read."""

import json
import math
import re
from dataclasses import field
from typing import Any

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# An item of a list: in double quotes, in single quotes (where '' is a quote), or as it stands up to the next comma.
ITEM = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^']|'')*)'|([^,]*?))\s*(?:,|$)""")


def setting(default: Any, meaning: str, *, affects_result: bool = True, added_later: bool = False) -> Any:
    """Declare a field; `affects_result=False` keeps it out of fingerprints, so that changing it re-runs nothing.

    `added_later=True` keeps it out while it holds its default: what was made before the setting existed was made with
    that, and is still found.
    """
    metadata = {"meaning": meaning, "affects_result": affects_result, "added_later": added_later}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: object, message: str) -> None:
    """Raise `ValueError` with one sentence for the person who wrote the setting."""
    if not condition:
        raise ValueError(message)


def read_value(given: Any, kind: Any) -> Any:
    """Read a setting's value from its text, or from the strings and lists that a preset holds.

    A string takes its text as it stands: no word and no number in it means something else.
    Raises `ValueError` that says what the setting takes: "takes a whole number".
    """
    if kind is str:
        require(isinstance(given, str), "takes a text; put it into quotes")
        return given
    if kind is bool:
        word = given.strip().lower() if isinstance(given, str) else ""
        require(word in TRUE + FALSE, "takes true or false")
        return word in TRUE
    if kind is int:
        require(isinstance(given, str) and re.fullmatch(r"\s*[+-]?\d+(_\d+)*\s*", given), "takes a whole number")
        return int(given)
    if kind is float:
        try:
            value = float(given)
        except (TypeError, ValueError):
            value = math.nan
        require(math.isfinite(value), "takes a number")
        return value
    if kind == list[str]:
        items = _items(given)
        require(all(isinstance(item, str) for item in items), "takes a list of texts; put each into quotes")
        return items
    if kind == int | list[int]:
        is_list = isinstance(given, list) or (isinstance(given, str) and given.strip().startswith("["))
        try:
            return [read_value(item, int) for item in _items(given)] if is_list else read_value(given, int)
        except ValueError:
            raise ValueError("takes a whole number, or two in brackets") from None
    raise TypeError(f"settings of the type {kind} are not read from text")


def _items(given: Any) -> list[Any]:
    if isinstance(given, list):
        return given
    text = given.strip() if isinstance(given, str) else ""
    require(text.startswith("[") and text.endswith("]"), "takes a list; write [first,second]")
    inner, items, position = text[1:-1], [], 0
    while position < len(inner):
        item = ITEM.match(inner, position)
        assert item is not None
        double, single, plain = item.groups()
        if double is not None:
            try:
                plain = json.loads(f'"{double}"')
            except ValueError:
                plain = double
        items.append(plain if single is None else single.replace("''", "'"))
        position = item.end()
    return items
