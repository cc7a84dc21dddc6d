"""A preset's file: found by its path or its name, and read as the texts that stand in it.

What a text means, the type of its setting says (`model.settings.read_value`), so `name: 2024.10` is no number.
"""

from pathlib import Path
from typing import Any

import yaml

from model.settings import require

PRESETS = Path(__file__).parents[1] / "jobs/presets"


def find_preset(preset: str | Path) -> Path:
    """The file of a preset: a path, or the name of one of those in jobs/presets."""
    for path in (Path(preset), PRESETS / f"{preset}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    raise ValueError(f"There is no preset {str(preset)!r}: give the path of a YAML file, or one of {known}.")


def read_preset(path: Path) -> dict[str, Any]:
    """The settings of a preset by their dotted keys: each a text, a list, or what no setting takes."""
    try:
        loaded = _Texts(path.read_text(encoding="utf-8-sig")).get_single_data()
    except UnicodeDecodeError as error:
        raise ValueError(f"It is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"It is not valid YAML{_place(error)}.") from None
    require(loaded is None or isinstance(loaded, dict), "It is not a YAML mapping of settings.")
    values: dict[str, Any] = {}
    for key, given in (loaded or {}).items():
        inner = {f"{key}.{name}": value for name, value in given.items()} if isinstance(given, dict) else {key: given}
        for name, value in inner.items():
            require(name not in values, f"{name!r} stands there twice, as a line and in its section; keep one.")
            values[name] = value
    return values


def _place(error: yaml.YAMLError) -> str:
    """Where a file stops being YAML, and why; the parser's own text shows the file's lines and no name."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        return f"{place}: {' '.join(filter(None, (error.context, error.problem)))}"
    return f": {' '.join(str(error).split())}"


class YamlWriter(yaml.SafeDumper):
    """Writes texts that come back as they are; PyYAML reads the Unicode line breaks that it leaves bare as spaces."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        style = '"' if set("\x85\u2028\u2029") & set(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


YamlWriter.add_representer(str, YamlWriter.represent_str)


class _Texts(yaml.BaseLoader):
    """Makes a text of every scalar, and says where a key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            require(isinstance(key, yaml.ScalarNode), f"The key in line {line} is no text; put it into quotes.")
            require(key.value not in seen, f"{key.value!r} stands there twice, again in line {line}; keep one.")
            seen.add(key.value)
        return super().construct_mapping(node, deep)
