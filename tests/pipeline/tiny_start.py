"""Folders of random weights as `transformers` writes them, for trainings to start from; nothing is downloaded."""

from pathlib import Path
from typing import Any

from model.chat import save_template
from model.tokenizer import Tokenizer
from tests.model.tiny_folders import VOCABULARY, write_folder

# So many rows more than the tokenizer has tokens: folders of the hub are padded so.
PADDING = 20
FAMILIES = ("gpt2", "qwen3", "llama3")


def write_start(folder: Path, family: str, tokenizer: Tokenizer | None, *, template: str = "", **settings: Any) -> Path:
    """Write a model of random weights with a tokenizer and a chat template beside it."""
    size = VOCABULARY if tokenizer is None else tokenizer.vocab_size + PADDING
    end = size - PADDING - 1
    write_folder(folder, family, vocab_size=size, bos_token_id=end, eos_token_id=end, **settings)
    if tokenizer is not None:
        tokenizer.save(folder)
        if template:
            save_template(folder, template)
    return folder
