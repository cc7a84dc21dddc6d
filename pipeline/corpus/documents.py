"""Held-out documents as text again, for whoever scores them one by one."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from model.tokenizer import Tokenizer
from pipeline.artifacts import Artifact


def read_documents(shards: Artifact, tokenizer: Tokenizer, most: int) -> list[str]:
    """Return the validation split's texts, `most` of them at most, evenly spaced; empty ones are left out.

    `tokenizer` is the one that the shards were written with. Raises `ValueError` where a shard is damaged.
    """
    manifest = shards.manifest()
    assert manifest is not None
    records = {name: record for name, record in manifest.files.items() if name.startswith("val/")}
    rows: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        shards.download(Path(folder), records)
        for name in sorted(records):
            column = pq.read_table(Path(folder) / name, columns=["tokens"])["tokens"]
            rows += [np.asarray(row.values) for row in column]
    chosen = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    texts = [tokenizer.decode(rows[at]) for at in chosen]
    return [text for text in texts if text]
