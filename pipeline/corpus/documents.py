"""Held-out documents as text again, for whoever scores them one by one."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from model.tokenizer import Tokenizer
from pipeline.artifacts import Artifact
from pipeline.corpus.members import members_of


def read_documents(shards: Artifact, tokenizer: Tokenizer, most: int) -> list[str]:
    """Return the validation split's texts, `most` of them at most, evenly spaced; empty ones are left out.

    Of a mix those of each source in turn. `tokenizer` is the one that the shards were written with. Raises `ValueError`
    where a shard is damaged.
    """
    rows: list[np.ndarray] = []
    for member in members_of(shards):
        rows += _read_rows(member.shards)
    chosen = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    texts = [tokenizer.decode(rows[at]) for at in chosen]
    return [text for text in texts if text]


def _read_rows(shards: Artifact) -> list[np.ndarray]:
    """Return the tokens of each held-out document."""
    manifest = shards.manifest()
    assert manifest is not None
    records = {name: record for name, record in manifest.files.items() if name.startswith("val/")}
    rows: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        shards.download(Path(folder), records)
        for name in sorted(records):
            column = pq.read_table(Path(folder) / name, columns=["tokens"])["tokens"]
            rows += [np.asarray(row.values) for row in column]
    return rows
