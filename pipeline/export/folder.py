"""A model as a plain Hugging Face folder, with its card: what other programs open, and nothing of ours besides."""

import shutil
from pathlib import Path

from model.checkpoint import weight_files
from model.families import ARCHITECTURES, family_of, load_config
from model.vocabulary import FILES

README = "README.md"
INDEX = "model.safetensors.index.json"
OTHERS = ("config.json", "generation_config.json", *FILES)


def list_files(folder: Path) -> list[Path]:
    """What of a checkpoint's folder is the model: weights, settings, tokenizer, card; no training state."""
    weights = weight_files(folder)
    small = [folder / name for name in (README, *OTHERS)]
    index = [folder / INDEX] if len(weights) > 1 or weights[0].name != "model.safetensors" else []
    return [*weights, *(path for path in (*small, *index) if path.is_file())]


def write_folder(source: Path, target: Path, name: str) -> list[Path]:
    """Copy the model into a new folder, and write a card where it has none; returns the files.

    Raises `ValueError` where something is in that folder already.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already, and is not empty; name another folder.")
    load_config(source)  # what no program could open is said before anything is written
    target.mkdir(parents=True, exist_ok=True)
    files = [Path(shutil.copyfile(path, target / path.name)) for path in list_files(source)]
    if not (target / README).exists():
        (target / README).write_text(plain_card(source, name), encoding="utf-8")
        files.append(target / README)
    return files


def plain_card(folder: Path, name: str) -> str:
    """A card from what the folder alone says; a training's own card says more."""
    config, vocab_size = load_config(folder)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {name}\n\n"
        f"A language model of the class `{ARCHITECTURES[family_of(config)]}`: {config.num_layers} layers of"
        f" {config.width} channels, {config.num_heads} heads of {config.channels_per_head}, a context of"
        f" {config.context_length:,} tokens, a vocabulary of {vocab_size:,}.\n\n"
        "What it learnt from is not known where this card was written.\n"
    )
