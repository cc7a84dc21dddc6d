"""Stage 1: the tokenizer, trained on a sample of the corpus or fetched by name."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from model.tokenizer import NAMED_TOKENIZERS, PATTERNS, Tokenizer, build_char, check_pattern, named_tokenizer, train_bpe
from pipeline.artifacts import Artifact, Manifest
from pipeline.config import Config, SourceConfig, TokenizerConfig, result_settings
from pipeline.corpus.formats import iterate_text

FORMAT_VERSION = 1


def settings(config: Config) -> dict[str, Any]:
    """What decides the vocabulary; a named one has nothing else."""
    if config.tokenizer.kind in NAMED_TOKENIZERS:
        return {"kind": config.tokenizer.kind}
    return result_settings(config.tokenizer)


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Make the tokenizer on one worker, where its memory belongs, and store its files."""
    if config.tokenizer.kind == "bpe":
        check_pattern(_pattern(config.tokenizer))  # here, before any text is read
    began = time.monotonic()
    learned = ray.get(_make.remote(config.source, config.tokenizer))
    tokenizer: Tokenizer = learned.tokenizer
    bytes_per_token = learned.sample_bytes / max(learned.sample_tokens, 1)
    if learned.sample_bytes:
        print(
            f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} tokens, {bytes_per_token:.2f} bytes per token on a"
            f" sample of {learned.sample_bytes / 1e6:.1f} MB, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    files = {name: output.write_text(name, content) for name, content in tokenizer.files().items()}
    return output.commit(
        counts={
            "name": tokenizer.name,
            "vocabulary_size": tokenizer.vocab_size,
            "tokenizer_digest": tokenizer.digest,
            "sample_bytes": learned.sample_bytes,
            "bytes_per_token": round(bytes_per_token, 4),
        },
        files=files,
    )


@dataclass(frozen=True)
class Learned:
    """A tokenizer, and how well it did on (the start of) what it was learned from."""

    tokenizer: Tokenizer
    sample_bytes: int
    sample_tokens: int


@ray.remote(num_cpus=1)
def _make(source: SourceConfig, chosen: TokenizerConfig) -> Learned:
    measure_bytes = 5_000_000
    if chosen.kind in NAMED_TOKENIZERS:
        tokenizer = named_tokenizer(chosen.kind)
        measure_bytes = 1_000_000
    else:
        texts = _valid_texts(source, chosen.sample_megabytes * 1_000_000)
        if chosen.kind == "char":
            tokenizer = build_char(texts, chosen.vocabulary_size)
        else:
            tokenizer = train_bpe(texts, chosen.vocabulary_size, _pattern(chosen))
    sample_bytes = sample_tokens = 0
    for text in _valid_texts(source, measure_bytes):
        sample_bytes += len(text.encode())
        sample_tokens += len(tokenizer.encode(text))
    return Learned(tokenizer, sample_bytes, sample_tokens)


def _valid_texts(source: SourceConfig, sample_bytes: int) -> Iterator[str]:
    """Sample the corpus; raises `ValueError` if there is no text in it at all."""
    # Half characters are prepare's to count; here they would only stop the training.
    readable = dataclasses.replace(source, invalid_text="replace")
    is_empty = True
    for text in iterate_text(readable, sample_bytes):
        is_empty = is_empty and not text.strip()
        yield text
    if is_empty:
        raise ValueError("The corpus is empty: no document of the source holds any text.")


def _pattern(chosen: TokenizerConfig) -> str:
    return PATTERNS.get(chosen.pattern, chosen.pattern)
