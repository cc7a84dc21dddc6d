"""A Hugging Face folder as one GGUF file, which llama.cpp and ollama open.

    name = find_pattern(tokenizer)              # what llama.cpp calls the way in which this tokenizer splits text
    write_gguf(folder, Path("model.gguf"), "q8_0")

llama.cpp knows how a tokenizer splits text by a name, and has no place in a file for a pattern of one's own. So the
names are tried: the one under which `tokenizers` finds the same ids for every probe is written. Where there is none,
nothing is written: a model that reads other tokens than it learnt writes nonsense, and nobody is told.
"""

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.chat import MARKER, OwnTemplate, load_template
from model.checkpoint import BUFFERS, read_weights
from model.config import ModelConfig
from model.families import family_of, load_config
from model.pattern import PATTERNS, probes
from model.tokenizer import load_tokenizer
from model.vocabulary import TOKENIZER_FILE, Tokenizer

TYPES = ("f16", "bf16", "q8_0")
ARCHITECTURES = {"gpt2": "gpt2", "qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama"}
Q8_BLOCK = 32  # values of a row that share a scale
LARGEST_F16 = 65504.0
VLLM_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 192, 256)  # for which its CPU has kernels; its GPUs take some more

_CASELESS = r"'(?i:[sdmt]|ll|ve|re)"
_ENDING = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# llama.cpp's name -> the patterns that it splits by, one after the other, and whether a piece that is a token is taken
# without merging.
LLAMA_CPP: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "llama-bpe": (
        (rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDING}",),
        True,
    ),
    "qwen2": (
        (rf"{_CASELESS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDING}",),
        False,
    ),
    "smollm": ((r"\p{N}", _GPT2), False),
    "gpt-4o": (
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDING}",
        ),
        False,
    ),
}
OURS = {PATTERNS["gpt2"]: "gpt-2", PATTERNS["llama-bpe"]: "llama-bpe", PATTERNS["qwen2"]: "qwen2"}
GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # for training alone; not every engine reads them


def find_pattern(tokenizer: Tokenizer) -> str:
    """Return the name under which llama.cpp gives a text the same ids; raises `ValueError` where there is none."""
    # As their tokens spell them: llama.cpp does not normalise.
    texts = [tokenizer.spell(text).decode(errors="ignore") for text in (*probes(), *_own_probes(tokenizer))]
    wanted = [ids.tolist() for ids in tokenizer.encode_all(texts)]
    facts = json.loads(tokenizer.files()[TOKENIZER_FILE])
    nearest: tuple[int, str] = (-1, "")
    meant = OURS.get(getattr(tokenizer, "pattern", ""))
    for name in sorted(LLAMA_CPP, key=lambda name: name != meant):  # a small vocabulary suits several
        same, differing = 0, ""
        encoded = _as_llama_cpp(facts, name).encode_batch(texts, add_special_tokens=False)
        for text, ids, found in zip(texts, wanted, encoded, strict=True):
            if ids == found.ids:
                same += 1
            elif not differing or len(text) < len(differing):
                differing = text
        if not differing:
            return name
        nearest = max(nearest, (same, f"as {name} it would read {differing!r} otherwise"))
    raise ValueError(
        f"llama.cpp would give this model other tokens than it learnt ({nearest[1]}): it splits text by patterns it"
        " knows by name, and none of them is this tokenizer's. For a model that shall go there, train one with"
        " tokenizer.kind=bpe and tokenizer.pattern=llama-bpe (or qwen2, gpt2)."
    )


def _own_probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts that a vocabulary has long tokens for: its own tokens side by side, and numbers of up to 8 digits."""
    chance = random.Random(0)
    ids = [token for token, content in enumerate(tokenizer.token_bytes) if content]
    for length in (1, 2, 3, 8, 30):
        for _ in range(200):
            yield tokenizer.decode(chance.choices(ids, k=length)).replace("\ufffd", "")
    digits = [token for token in ids if tokenizer.token_bytes[token].isdigit()]
    for length in (2, 3, 4, 8):
        for _ in range(100):
            yield "".join(chance.choices("0123456789", k=length))
            yield tokenizer.decode(chance.choices(digits, k=length))


def _as_llama_cpp(facts: dict[str, Any], name: str) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    patterns, takes_whole_pieces = LLAMA_CPP[name]
    added_ids = {each["content"]: each["id"] for each in facts.get("added_tokens") or ()}
    library = Tokenizer(
        models.BPE(facts["model"]["vocab"] | added_ids, list(_merges(facts)), ignore_merges=takes_whole_pieces)
    )
    # Tokens that were added and are no special ones: llama.cpp takes them out of a text first, as `tokenizers` does.
    added = [each["content"] for each in facts.get("added_tokens") or () if not each["special"]]
    library.add_tokens([AddedToken(content, normalized=False) for content in added])
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_alone])
    return library


def _merges(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in facts["model"]["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def head_size_notes(config: ModelConfig) -> list[str]:
    """Say which engines cannot take the model's attention heads, a sentence for each."""
    size = config.channels_per_head
    notes = []
    if size not in VLLM_HEAD_SIZES:
        sizes = ", ".join(map(str, VLLM_HEAD_SIZES))
        notes.append(f"vLLM may refuse it: its kernels are for heads of {sizes} channels, and these have {size}.")
    if size % Q8_BLOCK:
        notes.append(
            f"llama.cpp and ollama cannot store its cache in 8 bits (-ctk q8_0), which goes in blocks of {Q8_BLOCK}"
            f" channels, and its heads have {size}; the default, f16, works."
        )
    return notes


def write_gguf(folder: Path, target: Path, kind: str, name: str = "") -> str:
    """Write a folder's model, tokenizer and chat template; returns llama.cpp's name of the pattern.

    Matrices are stored as `kind`, vectors and learned positions in 32 bits. Raises `ValueError` where llama.cpp would
    compute something else.
    """
    import gguf

    if kind not in TYPES:
        raise ValueError(f"The type is {kind!r}; it can be {', '.join(TYPES)}.")
    config, vocab_size = load_config(folder)
    family = family_of(config)
    if family == "llama" and config.mlp_bias:
        raise ValueError("llama.cpp's Llama has no biases in its MLP; this model has (model.mlp_bias=true).")
    if family == "qwen3" and config.has_output_bias:
        raise ValueError("llama.cpp's Qwen3 has no biases; this model has (model.attention_bias=all).")
    tokenizer = load_tokenizer(folder)
    pattern = find_pattern(tokenizer)
    temporary = target.with_name(f".tmp-{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(temporary, ARCHITECTURES[family])
    try:
        writer.add_name(name or folder.name)
        _add_settings(writer, config, vocab_size, kind)
        _add_tokenizer(writer, folder, tokenizer, pattern, vocab_size)
        for tensor_name, weight in _tensors(folder, config, family):
            _add_tensor(writer, tensor_name, weight, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return pattern


def _add_settings(writer: Any, config: ModelConfig, vocab_size: int, kind: str) -> None:
    import gguf

    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_channels)
    writer.add_head_count(config.num_heads)
    writer.add_vocab_size(vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    file_types = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    if not config.is_modern:
        writer.add_layer_norm_eps(config.epsilon)
        return
    writer.add_layer_norm_rms_eps(config.epsilon)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.channels_per_head)
    writer.add_value_length(config.channels_per_head)
    writer.add_rope_dimension_count(config.channels_per_head)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)


def _add_tokenizer(writer: Any, folder: Path, tokenizer: Tokenizer, pattern: str, vocab_size: int) -> None:
    import gguf

    facts = json.loads(tokenizer.files()[TOKENIZER_FILE])
    spelled = {token: text for text, token in facts["model"]["vocab"].items()}
    added = {token["id"]: token["content"] for token in facts.get("added_tokens") or ()}
    tokens, types = [], []
    for token in range(vocab_size):
        if token in tokenizer.special_names:
            tokens.append(tokenizer.special_names[token])
            types.append(gguf.TokenType.CONTROL)
        elif token in added:
            tokens.append(added[token])
            types.append(gguf.TokenType.USER_DEFINED)
        elif token in spelled:
            tokens.append(spelled[token])
            types.append(gguf.TokenType.NORMAL)
        else:  # a row of the embedding that no text reaches
            tokens.append(f"[PAD{token}]")
            types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{first} {second}" for first, second in _merges(facts)])
    writer.add_bos_token_id(tokenizer.begin_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)  # as here: a prompt is what was written
    others = sorted(tokenizer.stop_tokens - {tokenizer.end_of_text})
    if others:
        writer.add_eot_token_id(others[0])
    template = load_template(folder)
    if template is not None:
        writer.add_chat_template(GENERATION_TAGS.sub("", template.text))


def _tensors(folder: Path, config: ModelConfig, family: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under llama.cpp's name, laid out as it wants it."""
    import gguf

    architecture = {names: number for number, names in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[family]]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    prefix = "model." if config.is_modern else "transformer."
    weights = read_weights(folder)
    for name in sorted(weights):
        if name.endswith(BUFFERS):
            continue
        weight = weights[name].float()
        full = name if name.startswith((prefix, "lm_head.")) else f"{prefix}{name}"
        if full.startswith("lm_head.") and config.tie_embeddings:
            continue
        if not config.is_modern and weight.ndim == 2 and ".h." in full:
            weight = weight.t()  # GPT-2's folders keep them so
        if family == "llama" and ".self_attn.q_proj." in full:
            weight = _interleave(weight, config.num_heads)
        if family == "llama" and ".self_attn.k_proj." in full:
            weight = _interleave(weight, config.kv_heads)
        theirs = names.get_name(full, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, full
        yield theirs, weight.contiguous()
    if config.rope_scaling == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config)


def _interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Order the channels of each head so that the two which RoPE turns together stand side by side."""
    halves = weight.reshape(num_heads, 2, len(weight) // num_heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _llama3_factors(config: ModelConfig) -> Tensor:
    """By how much each wavelength is stretched."""
    size = config.channels_per_head
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = config.rope_original_context * frequencies / (2 * math.pi)
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched in full, 1: as it was
    return (1 / ((1 - share) / config.rope_factor + share)).float()


def _add_tensor(writer: Any, name: str, weight: Tensor, kind: str) -> None:
    import gguf

    values: np.ndarray = weight.numpy()
    stored = "F32" if values.ndim == 1 or name.startswith("position_embd") else kind.upper()
    if stored == "Q8_0" and values.shape[-1] % Q8_BLOCK:
        stored = "F16"  # as llama.cpp's own converter does
    if stored == "F16" and float(np.abs(values).max()) > LARGEST_F16:
        raise ValueError(f"{name} holds numbers over {LARGEST_F16:.0f}, the largest of f16; export it as bf16.")
    type_ = gguf.GGMLQuantizationType[stored]
    writer.add_tensor(name, gguf.quants.quantize(values, type_), raw_dtype=type_)


# Our template in the language of ollama's, which has no way to put a backslash into what could pass for a marker.
OLLAMA_TEMPLATE = (
    "{{- range .Messages }}<|chat|>{{ .Role }}\n{{ .Content }}"
    '{{ if eq .Role "assistant" }}<|endoftext|>{{ else }}\n{{ end }}{{ end }}<|chat|>assistant\n'
)


def write_modelfile(folder: Path, gguf_file: Path, target: Path) -> None:
    """Write what `ollama create NAME -f Modelfile` reads: the file, how it talks, where an answer ends, its context.

    A stranger's chat template is left to ollama, which knows those of the common families.
    """
    config, _ = load_config(folder)
    template = load_template(folder)
    lines = [f"FROM ./{gguf_file.name}", f"PARAMETER num_ctx {config.context_length}"]
    if template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif isinstance(template, OwnTemplate):
        lines += [f'TEMPLATE """{OLLAMA_TEMPLATE}"""', f'PARAMETER stop "{MARKER}"']
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
