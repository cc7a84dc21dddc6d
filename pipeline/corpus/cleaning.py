"""Which documents to leave out. Each rule is off by default; what it drops is counted under its reason.

`reason_to_drop` holds the rules that look at one document alone. Duplicates are found in two passes, which hold at
most one partition of the hashes in memory, however large the corpus:

    sign      each unit of work writes the hashes of its documents, sorted by partition (`sign_documents`)
    compare   each partition is compared over all units (`find_duplicates`); the first of equal documents stays
"""

import hashlib
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import PrepareConfig

TOO_SHORT, TOO_LONG, LOW_QUALITY = "too short", "too long", "not English prose"
EXACT, NEAR = "exact duplicate", "near duplicate"

NUM_HASHES = 128
SHINGLE_WORDS = 5
SIGNATURE = pa.binary(NUM_HASHES)
# The share of pairs just as similar as the threshold that the bands must bring together.
LEAST_RECALL = 0.95
MOST_COMPARED = 200

# Scripts without spaces between words: there each character counts as one, so that a run of words is a run of
# characters. Thai, Lao, Myanmar, Khmer, kana, Han and what Unicode added to them.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
_COMMON = re.compile(r"\b(?:the|be|to|of|and|that|have|with|is|are|was|for|in|it|this|on|as|you)\b")


def find_words(text: str) -> list[str]:
    """Return a text's words in lower case, without what stands between them."""
    return _WORD.findall(text.lower())


def reason_to_drop(text: str, settings: PrepareConfig) -> str:
    """Judge one document; return the reason to drop it, or an empty string to keep it."""
    if len(text) < settings.min_characters:
        return TOO_SHORT
    if settings.max_characters and len(text) > settings.max_characters:
        return TOO_LONG
    return LOW_QUALITY if settings.quality_filter and not reads_like_prose(text) else ""


def reads_like_prose(text: str) -> bool:
    """The quality rule, for English alone, after Gopher's (Rae et al. 2021, table A1). All of these hold:

    - 50 words or more, of 3 to 10 characters on average;
    - at least 80 % of them have a letter, and at least 5 % are one of 18 common English words;
    - fewer than one '#' or '…' for ten words;
    - at most 90 % of the lines start with a bullet, at most 30 % end with an ellipsis;
    - no line makes up 30 % of the text by being repeated.
    """
    words = text.split()
    if len(words) < 50 or not 3 <= sum(map(len, words)) / len(words) <= 10:
        return False
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return False
    if len(_COMMON.findall(text.lower())) < 0.05 * len(words):
        return False
    if text.count("#") + text.count("…") + text.count("...") > 0.1 * len(words):
        return False
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(line.startswith(("•", "-", "*", "‣")) for line in lines) > 0.9 * len(lines):
        return False
    if sum(line.endswith(("…", "...")) for line in lines) > 0.3 * len(lines):
        return False
    repeated = len(lines) - len(set(lines))
    return repeated == 0 or sum(map(len, lines)) - sum(map(len, set(lines))) <= 0.3 * len(text)


# Signing ----------------------------------------------------------------------------------------------------------


def bands_for(similarity: float) -> tuple[int, int]:
    """Return (bands, rows per band): the most rows with which the bands still find LEAST_RECALL of the pairs.

    The more rows a band has, the fewer documents that differ share its key.
    """
    for rows in range(NUM_HASHES, 1, -1):
        bands = NUM_HASHES // rows
        if 1 - (1 - similarity**rows) ** bands >= LEAST_RECALL:
            return bands, rows
    return NUM_HASHES, 1


def minhash(text: str) -> np.ndarray | None:
    """Hash the set of a text's runs of five words, or of five characters in a script without spaces, into a signature.

    None where there are no words.
    """
    words = find_words(text)
    if not words:
        return None
    from datasketch import MinHash  # here, for it takes seconds to import and few corpora need it

    hasher = MinHash(NUM_HASHES, seed=1, hashfunc=zlib.crc32, permutations=_permutations(), scheme="affine32")
    last = max(len(words) - SHINGLE_WORDS + 1, 1)
    for start in range(0, last, 4096):  # in batches, for each run takes NUM_HASHES x 8 bytes
        stop = min(start + 4096, last)
        hasher.update_batch([" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in range(start, stop)])
    return hasher.hashvalues


@lru_cache(maxsize=1)
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(NUM_HASHES, seed=1, scheme="affine32").permutations


def sign_documents(
    documents: Iterable[tuple[int, str]], settings: PrepareConfig, partitions: int
) -> Iterator[tuple[str, bytes]]:
    """Yield (kind, Parquet file) with the hashes of (position, text): one row for each hash, ordered by partition."""
    exact_keys: list[bytes] = []
    exact_positions: list[int] = []
    signatures: list[np.ndarray] = []
    near_positions: list[int] = []
    for position, text in documents:
        if settings.drop_exact_duplicates:
            exact_keys.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
            exact_positions.append(position)
        if settings.drop_near_duplicates and (signature := minhash(text)) is not None:
            signatures.append(signature)
            near_positions.append(position)
    if settings.drop_exact_duplicates:
        halves = np.frombuffer(b"".join(exact_keys), dtype="<u8").reshape(-1, 2)
        rows = {
            "key": halves[:, 0],
            "rest": halves[:, 1],
            "position": np.array(exact_positions, dtype=np.int32),
        }
        yield EXACT, _write_partitions(rows, partitions)
    if settings.drop_near_duplicates:
        bands, rows_per_band = bands_for(settings.near_duplicate_similarity)
        hashes = np.array(signatures, dtype=np.uint64).reshape(-1, NUM_HASHES)
        keys = [_band_key(hashes, band, rows_per_band) for band in range(bands)]
        # One byte of each hash is enough to estimate similarity: different hashes share it once in 256 times.
        short = (hashes & np.uint64(255)).astype(np.uint8)
        rows = {
            "key": np.concatenate(keys),
            "position": np.tile(np.array(near_positions, dtype=np.int32), bands),
            "signature": np.tile(short, (bands, 1)),
        }
        yield NEAR, _write_partitions(rows, partitions)


def _band_key(hashes: np.ndarray, band: int, rows: int) -> np.ndarray:
    """Mix the hashes of one band, and its number, into 64 bits."""
    key = np.full(len(hashes), band + 1, dtype=np.uint64)
    for row in range(band * rows, (band + 1) * rows):
        key = (key ^ hashes[:, row]) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _write_partitions(rows: dict[str, np.ndarray], partitions: int) -> bytes:
    """Write one row group for each partition that has rows; a reader skips the others by their statistics."""
    partition = (rows["key"] % np.uint64(partitions)).astype(np.int32)
    order = np.argsort(partition, kind="stable")
    columns = {name: values[order] for name, values in rows.items()}
    arrays: dict[str, pa.Array] = {"partition": pa.array(partition[order])}
    for name, values in columns.items():
        flat = pa.py_buffer(np.ascontiguousarray(values))
        is_signature = name == "signature"
        arrays[name] = pa.Array.from_buffers(SIGNATURE, len(values), [None, flat]) if is_signature else pa.array(values)
    table = pa.table(arrays)
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="none", use_dictionary=False) as writer:
        edges = np.searchsorted(partition[order], np.arange(partitions + 1))
        for start, stop in pairwise(edges.tolist()):
            if stop > start:
                writer.write_table(table.slice(start, stop - start))
    return sink.getvalue()


# Comparing --------------------------------------------------------------------------------------------------------


def find_duplicates(kind: str, partition: int, units: Iterable[IO[bytes]], similarity: float) -> dict[int, list[int]]:
    """Compare one partition of the hashes of all units, in order; return unit index -> positions to drop."""
    tables = []
    for index, handle in enumerate(units):
        table = pq.read_table(handle, filters=[("partition", "==", partition)])
        tables.append(table.append_column("unit", pa.array(np.full(len(table), index, dtype=np.int32))))
    if not tables:
        return {}
    table = pa.concat_tables(tables)
    columns = {name: table.column(name).to_numpy() for name in table.column_names if name != "signature"}
    # Sorting brings equal keys together, in the order in which their documents stand in the corpus.
    ranks = [columns["position"], columns["unit"], *([columns["rest"]] if kind == EXACT else []), columns["key"]]
    order = np.lexsort(ranks)
    keys = [columns[name][order] for name in (("key", "rest") if kind == EXACT else ("key",))]
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for key in keys:
        same &= key[1:] == key[:-1]
    if kind == EXACT:
        doomed = order[1:][same]
    else:
        signatures = _signatures(table)
        starts = np.flatnonzero(np.concatenate([[True], ~same])) if len(order) else np.zeros(0, dtype=int)
        stops = np.append(starts[1:], len(order))
        crowded = stops - starts > 1
        found = [
            _near(order[start:stop], signatures, similarity)
            for start, stop in zip(starts[crowded], stops[crowded], strict=True)
        ]
        doomed = np.concatenate(found) if found else np.zeros(0, dtype=int)
    result: dict[int, list[int]] = {}
    pairs = np.unique(np.stack([columns["unit"][doomed], columns["position"][doomed]], axis=1), axis=0)
    for unit, position in pairs.tolist():
        result.setdefault(unit, []).append(position)
    return result


def _signatures(table: pa.Table) -> np.ndarray:
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint8).reshape(-1, NUM_HASHES)[chunk.offset :][: len(chunk)]
        for chunk in table.column("signature").chunks
        if len(chunk)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, NUM_HASHES), dtype=np.uint8)


def _near(rows: np.ndarray, signatures: np.ndarray, similarity: float) -> np.ndarray:
    """Return the documents of one bucket that are at least as similar as asked to an earlier one that stays.

    They are compared with the first MOST_COMPARED that stay, so the time does not grow with the square of a bucket.
    """
    doomed: list[np.ndarray] = []
    for _ in range(MOST_COMPARED):
        if len(rows) < 2:
            break
        agreement = (signatures[rows[1:]] == signatures[rows[0]]).mean(axis=1)
        is_near = (agreement - 1 / 256) / (1 - 1 / 256) >= similarity
        doomed.append(rows[1:][is_near])
        rows = rows[1:][~is_near]
    return np.concatenate(doomed) if doomed else np.zeros(0, dtype=int)
