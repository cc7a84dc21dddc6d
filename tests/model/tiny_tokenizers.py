"""Small tokenizers in the shapes of well-known ones, made by the `tokenizers` library as their makers did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The map applies a function to every item of an iterable, yielding the results; don't stop, I'LL go.",
    "Résumé naïve café — “quoted”, 12345 numbers, 3.14159 and\r\nline breaks.\n\n\tIndented   more.",
    "日本語のテキストと漢字。Смешанный текст. مرحبا 👩‍👩‍👧",
    "def main(argv):\n    return [item for item in argv if item]\n",
    "<|im_start|>user\nthink <think> twice</think>",
] * 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def train(pre_tokenizer: Any, first: list[str], size: int = 420, **model: Any) -> Tokenizer:
    made = Tokenizer(models.BPE(**model))
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=first,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def special(name: str, **how: Any) -> AddedToken:
    return AddedToken(name, special=True, normalized=False, **how)


def split_by(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2() -> tuple[Tokenizer, dict[str, Any]]:
    made = train(pre_tokenizers.ByteLevel(add_prefix_space=False), [])
    made.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=True)])
    return made, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}


def smollm2() -> tuple[Tokenizer, dict[str, Any]]:
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made = train(
        pre_tokenizers.Sequence([digits, byte_level]), ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    )
    return made, {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|im_end|>"}


def llama3() -> tuple[Tokenizer, dict[str, Any]]:
    made = train(split_by(LLAMA3), [], ignore_merges=True)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made.add_special_tokens([special(name) for name in [*names, *(f"<|reserved_{i}|>" for i in range(20))]])
    begin = made.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made, {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>", "__type": "AddedToken"}}


def qwen2() -> tuple[Tokenizer, dict[str, Any]]:
    made = train(split_by(QWEN2), [])
    made.normalizer = normalizers.NFC()
    made.add_special_tokens([special(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    return made, {"eos_token": "<|im_end|>", "bos_token": None, "additional_special_tokens": ["<|im_start|>"]}


SHAPES: dict[str, Callable[[], tuple[Tokenizer, dict[str, Any]]]] = {
    "gpt2": gpt2,
    "smollm2": smollm2,
    "llama3": llama3,
    "qwen2": qwen2,
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, shape: str, **settings: Any) -> Tokenizer:
    """Write a tokenizer's files and return what the library makes of them."""
    made, config = SHAPES[shape]()
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1000, **config, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return made
