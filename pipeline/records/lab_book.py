"""How a training's run reads in MLflow: a name that a person would give, and a description with picture and figures.

client.create_run(experiment_id, run_name=name_run(config))
client.set_tag(run_id, NOTE_TAG, write_note(card, run_id))     # the model's card, see evaluation/model_card.py
"""

import posixpath
import re
from urllib.parse import quote

from pipeline.config import Config
from pipeline.tracking import LONGEST_NOTE

SHOWN_PATHS = 2  # of source.paths in a name


def name_run(config: Config) -> str:
    """Preset, size, data, and what it starts from, such as `demo 2.6M python-docs`."""
    # Torch comes with it, which an import of this module is to be without.
    from model.gpt import count_parameters

    size = describe_count(count_parameters(config.model, config.tokenizer.most_tokens))
    start = f" from {name_start(config.start.model)}" if config.start.model else ""
    return f"{config.name} {size} {name_data(config)}{start}"


def name_start(model: str) -> str:
    """A person's word for weights: the registered model's or the repository's name, or the folder's."""
    if model.startswith("models:/"):
        return re.split("[/@]", model.removeprefix("models:/"))[0]
    return posixpath.basename(model.rstrip("/").partition("@")[0]) or model


def name_data(config: Config) -> str:
    """What is read, in a word or two."""
    source = config.source
    if source.kind == "mix":
        return "+".join(part.name for part in source.parts())
    if not source.paths:
        return source.kind
    shown = [_last_part(path) for path in source.paths[:SHOWN_PATHS]]
    more = len(source.paths) - len(shown)
    return "+".join(shown) + (f"+{more} more" if more else "")


def describe_count(count: float) -> str:
    """A number of parameters as papers say it: 2.6M, 124M, 1.3B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            scaled = count / size
            return f"{scaled:.1f}{unit}" if scaled < 10 else f"{scaled:.0f}{unit}"
    return f"{count:.0f}"


def write_note(card: str, run_id: str = "", plot: str = "loss.png") -> str:
    """Return a run's description: score, loss plot as MLflow serves it, and the card without the code that opens it."""
    text = re.sub(r"\A---\n.*?\n---\n+", "", card, flags=re.DOTALL)  # the hub's metadata
    text = text.partition("\n## Use\n")[0].rstrip() + "\n"
    introduction, _, rest = text.partition("\n## ")
    score = re.search(r"^[\d.]+ bits per byte.*$", text, re.MULTILINE)
    lines = [introduction.partition("\n")[2].strip()]  # MLflow shows these first, and the rest when it is asked
    if score is not None:
        lines.insert(0, f"**{score[0]}**")
    if run_id:
        # Relative to the page, so that it is found behind a proxy with a prefix too.
        lines.append(f"![loss by step](get-artifact?path={quote(plot)}&run_uuid={run_id})")
    return "\n\n".join([*lines, f"## {rest}"])[:LONGEST_NOTE]


def _last_part(path: str) -> str:
    """A person's word for a path: its last part without its endings; of a pattern, the folder's."""
    folder, name = posixpath.split(path.rstrip("/").partition("@")[0])
    word = re.sub(r"(\.[a-z]+\d?)+$", "", name)
    return posixpath.basename(folder) or path if not word or set(word) & set("*?[") else word
