"""Stage 1: the tokenizer, trained on a sample of the corpus, fetched by name, or the one that a start has."""

import dataclasses
import queue
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import ray

from model.pattern import PATTERNS, check_pattern
from model.tokenizer import NAMED_TOKENIZERS, Tokenizer, build_char, load_tokenizer, named_tokenizer, train_bpe
from pipeline.artifacts import Artifact, FileRecord, Manifest
from pipeline.config import Config, SourceConfig, TokenizerConfig, result_settings
from pipeline.corpus.files import Listing, Slice, listing_of, slices
from pipeline.corpus.formats import SAMPLE_SLICE_BYTES, sample_documents
from pipeline.corpus.omissions import Omissions, warn
from pipeline.corpus.progress import Progress
from pipeline.training.origins import TOKENIZER_FILES
from pipeline.training.start import fetch_start, store_start

FORMAT_VERSION = 1
MEASURED_BYTES = 5_000_000  # of the sample, by which the vocabulary is measured
MEASURED_BYTES_IF_NAMED = 1_000_000
REPORTED_CHARACTERS = 1_000_000  # that are read between two steps of the progress line


def settings(config: Config) -> dict[str, Any]:
    """What decides the vocabulary; a named one has nothing else, and a start's is among the inputs."""
    if config.tokenizer.kind in (*NAMED_TOKENIZERS, "start"):
        return {"kind": config.tokenizer.kind}
    return result_settings(config.tokenizer)


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Make the tokenizer on one worker, where its memory belongs, and store its files."""
    if config.tokenizer.kind == "bpe":
        check_pattern(_pattern(config.tokenizer))  # here, before any text is read
    start = inputs.get("start")
    if start is not None:
        store_start(config, start)
    began = time.monotonic()
    listing = listing_of(config.source)
    learned = _make_on_a_worker(config, listing, start)
    tokenizer: Tokenizer = learned.tokenizer
    bytes_per_token = learned.sample_bytes / max(learned.sample_tokens, 1)
    if learned.sample_bytes:
        print(
            f"tokenizer {tokenizer.name}: {tokenizer.vocab_size:,} tokens, {bytes_per_token:.2f} bytes per token on a"
            f" sample of {learned.sample_bytes / 1e6:.1f} MB, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    if reasons := learned.omissions.reasons(listing):
        print(f"tokenizer of {learned.omissions.read:,} documents in the sample: {reasons}", flush=True)
    warn("tokenizer", learned.omissions.warnings(listing))
    files = _copy_files(start, output) if start is not None else {}
    if start is None:
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


def _copy_files(start: Artifact, output: Artifact) -> dict[str, FileRecord]:
    """Take over all that the start says of its tokenizer, its chat template too."""
    manifest = start.manifest()
    assert manifest is not None
    return {
        name: output.write_bytes(name, start.read_bytes(name)) for name in TOKENIZER_FILES if name in manifest.files
    }


@dataclass(frozen=True)
class Learned:
    """A tokenizer, and how well it did on (the start of) what it was learned from."""

    tokenizer: Tokenizer
    sample_bytes: int
    sample_tokens: int
    omissions: Omissions


def _make_on_a_worker(config: Config, listing: Listing, start: Artifact | None) -> Learned:
    sources = [part.source for part in config.source.parts()] or [config.source]
    found = [(source, slices(source, SAMPLE_SLICE_BYTES, listing_of(source))) for source in sources]
    text_bytes = sum(slice_.text_bytes for _, of_source in found for slice_ in of_source)
    total = min(config.tokenizer.sample_megabytes * 1_000_000, text_bytes) + min(MEASURED_BYTES, text_bytes)
    unread = Listing(ignored=listing.ignored)
    answer: int | Learned = 0
    with Progress("tokenizer", total, silent_seconds=5) as progress:
        # Ray's types know no streams.
        references: Any = _make.remote(config.tokenizer, start, found, unread)
        for reference in references:
            answer = ray.get(reference)
            if isinstance(answer, int):
                progress.add(answer)
    assert isinstance(answer, Learned)
    return answer


@ray.remote(num_cpus=1, num_returns="streaming")
def _make(
    chosen: TokenizerConfig, start: Artifact | None, found: list[tuple[SourceConfig, list[Slice]]], unread: Listing
) -> Iterator[int | Learned]:
    """Yield how many bytes more were read, now and then, and the tokenizer at last."""
    amounts: queue.SimpleQueue[int] = queue.SimpleQueue()
    with ThreadPoolExecutor(max_workers=1) as pool:
        learned = pool.submit(_learn, chosen, start, _Sample(found, unread, amounts.put))
        while not learned.done():
            try:
                yield amounts.get(timeout=0.5)
            except queue.Empty:
                continue
        yield learned.result()


def _learn(chosen: TokenizerConfig, start: Artifact | None, sample: "_Sample") -> Learned:
    measured_bytes = MEASURED_BYTES
    if start is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = load_tokenizer(fetch_start(start, Path(folder), weights=False))
        measured_bytes = MEASURED_BYTES_IF_NAMED
    elif chosen.kind in NAMED_TOKENIZERS:
        tokenizer = named_tokenizer(chosen.kind)
        measured_bytes = MEASURED_BYTES_IF_NAMED
    else:
        texts = sample.texts(chosen.sample_megabytes * 1_000_000)
        if chosen.kind == "char":
            tokenizer = build_char(texts, chosen.vocabulary_size)
        else:
            tokenizer = train_bpe(texts, chosen.vocabulary_size, _pattern(chosen))
    omissions = sample.omissions
    sample_bytes = sample_tokens = 0
    for text in sample.texts(measured_bytes):
        sample_bytes += len(text.encode())
        sample_tokens += len(tokenizer.encode(text))
    assert sample.omissions is not None
    return Learned(tokenizer, sample_bytes, sample_tokens, omissions or sample.omissions)


class _Sample:
    """Texts from all over the corpus, the same each time; counts what of them is lost, and tells how far it is."""

    def __init__(
        self, found: list[tuple[SourceConfig, list[Slice]]], unread: Listing, report: Callable[[int], None]
    ) -> None:
        # Half characters are prepare's to refuse; here they would only stop the training.
        self._found = [(dataclasses.replace(source, invalid_text="replace"), slices_) for source, slices_ in found]
        self._unread = unread
        self._report = report
        self.omissions: Omissions | None = None  # of the last pass

    def texts(self, sample_bytes: int) -> Iterator[str]:
        """Yield about so many bytes, of a mix equally many from each source.

        Raises `ValueError` if there is no text in the corpus at all.
        """
        self.omissions = Omissions()
        unreported = 0
        share = sample_bytes // len(self._found)
        for document in chain.from_iterable(sample_documents(source, share, of) for source, of in self._found):
            self.omissions.count(document)
            text, _ = document
            if text is None:
                continue
            yield text
            unreported += len(text)
            if unreported >= REPORTED_CHARACTERS:
                self._report(unreported)
                unreported = 0
        self._report(unreported)
        if not self.omissions.kept:
            why = self.omissions.reasons(self._unread)
            raise ValueError(
                f"The corpus is empty: no document of the source holds any text{f' ({why})' if why else ''}."
            )


def _pattern(chosen: TokenizerConfig) -> str:
    return PATTERNS.get(chosen.pattern, chosen.pattern)
