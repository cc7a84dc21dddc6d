"""What a person wants to know about the shards: README.md with a histogram, beside them and in MLflow."""

import io
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact, FileRecord, Manifest
from pipeline.config import Config, to_yaml
from pipeline.corpus.contamination import RUN_WORDS
from pipeline.corpus.files import count_endings
from pipeline.corpus.members import Member


def write(
    config: Config, counts: Mapping[str, Any], files: Mapping[str, FileRecord], first_shard: str
) -> dict[str, bytes]:
    """Return the card's files: name -> content."""
    return {
        "README.md": _describe(config, counts, files, first_shard).encode(),
        "histogram.png": _draw(counts["lengths"], counts["tokenizer"]),
    }


def _describe_lost(counts: Mapping[str, Any]) -> list[str]:
    lost = sum(counts[split].get("bytes_without_token", 0) for split in ("train", "val"))
    return [f"Bytes left out, for which the tokenizer has no tokens: {lost:,}."] if lost else []


def sum_counts(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add up what the manifests of a mix's sources count; all have one tokenizer."""
    total: dict[str, Any] = {
        name: each[0][name] for name in ("tokenizer", "tokenizer_digest", "vocabulary_size", "end_of_text")
    }
    for name in ("train", "val", "dropped", "files_not_read"):
        summed: Counter[str] = Counter()
        for counts in each:
            summed.update(counts[name])
        total[name] = dict(summed)
    total["replaced_utf8"] = sum(counts["replaced_utf8"] for counts in each)
    total["lengths"] = [sum(column) for column in zip(*(counts["lengths"] for counts in each), strict=True)]
    spelled, tokens = (sum(total[split][kind] for split in ("train", "val")) for kind in ("bytes", "tokens"))
    total["bytes_per_token"] = round(spelled / tokens, 4)
    if any("cut" in counts for counts in each):
        total["cut"] = sum(counts.get("cut", 0) for counts in each)
    if "decontaminated" in each[0]:
        total["decontaminated"] = {
            task: found | {"documents": sum(counts["decontaminated"][task]["documents"] for counts in each)}
            for task, found in each[0]["decontaminated"].items()
        }
    return total


Part = tuple[Member, Manifest, int]  # a source of a mix, its manifest, and the tokens of one epoch of it


def describe_shares(config: Config, parts: Sequence[Part]) -> list[str]:
    """Say of each source of a mix its share, and how often a training of these settings reads it."""
    read = config.train.steps * config.train.batch_tokens
    return [
        f"{member.name}: {member.share:.2%} of the tokens, read {member.share * read / tokens:.2f} times in"
        f" {config.train.steps:,} steps"
        for member, _, tokens in parts
    ]


def write_mix(config: Config, counts: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, bytes]:
    """Return the files of a mix's card: shares, epochs, and where each source's own card is."""
    rows = []
    for member, manifest, tokens in parts:
        split = manifest.counts["train"]
        learnt = split.get("learnt_tokens", split["tokens"])
        epochs = member.share * config.train.steps * config.train.batch_tokens / tokens
        rows.append(
            f"| {member.name} | {member.share:.2%} | {split['documents']:,} | {split['tokens']:,} | {learnt:,} |"
            f" {round(tokens / member.share):,} | {epochs:.2f} | prepare-{member.shards.fingerprint} |"
        )
    text = [
        f"# Mix of {config.name}",
        "",
        "| source | share | documents | tokens | of them learnt | exhausted after | epochs | shards and their card |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Documents and tokens are those of the train split. A share is one of the tokens that a training reads (what is"
        " not learnt counts, and of conversations padding too), kept to a row or two in any stretch of the stream: 1 %"
        " in any 200 rows. A source that is exhausted, after so many tokens of all sources together, begins its next"
        " epoch in a new order while the others go on."
        f" Epochs are those of a training of {config.train.steps:,} steps of {config.train.batch_tokens:,} tokens.",
        "",
        "Each source keeps its own held-out documents. Duplicates are looked for inside each source.",
        "",
        "## Settings",
        "",
        "```yaml",
        to_yaml(config).strip(),
        "```",
        "",
    ]
    return {"README.md": "\n".join(text).encode(), "histogram.png": _draw(counts["lengths"], counts["tokenizer"])}


def log_to_mlflow(config: Config, output: Artifact, manifest: Manifest, card: Mapping[str, bytes]) -> None:
    """Log the card as an MLflow run of its own. The shards are whole without it: a failure is printed, not raised."""
    from pipeline import tracking

    try:
        tracking.connect(config)
        import mlflow

        with tempfile.TemporaryDirectory() as folder:
            for name, content in card.items():
                (Path(folder) / name).write_bytes(content)
            split = manifest.counts["train"]
            with mlflow.start_run(
                experiment_id=tracking.open_data_experiment(config),
                run_name=f"{config.source.kind} {split['documents']:,} documents, {split['tokens']:,} tokens",
                tags={
                    "stage": "prepare",
                    "url": output.url,
                    "fingerprint": output.fingerprint,
                    tracking.NOTE_TAG: card["README.md"].decode()[: tracking.LONGEST_NOTE],
                },
            ):
                for split in ("train", "val"):
                    mlflow.log_metrics({f"{split}_{name}": value for name, value in manifest.counts[split].items()})
                mlflow.log_artifacts(folder, "data_card")
    except Exception as error:
        print(f"prepare   the data card is not in MLflow: {tracking.first_line(error)}", file=sys.stderr)


def _describe(config: Config, counts: Mapping[str, Any], files: Mapping[str, FileRecord], first_shard: str) -> str:
    splits = {name: counts[name] for name in ("train", "val")}
    rows = [
        f"| {name} | {split['documents']:,} | {split['bytes']:,} | {split['tokens']:,} |"
        f" {sum(file.startswith(f'{name}/') for file in files):,} |"
        for name, split in splits.items()
    ]
    dropped = [f"| {reason} | {count:,} |" for reason, count in counts["dropped"].items()] or ["| nothing | 0 |"]
    lengths = [
        f"| {2 ** (power - 1) if power else 0:,} to {2**power - 1:,} | {count:,} |"
        for power, count in enumerate(counts["lengths"])
        if count
    ]
    digests = [f"| {name} | {record.bytes:,} | {record.sha256} |" for name, record in sorted(files.items())]
    return "\n".join(
        [
            f"# Token shards of {config.name}",
            "",
            "| split | documents | bytes of text | tokens | shards |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Tokenizer {counts['tokenizer']}: {counts['vocabulary_size']:,} tokens, the end of text is"
            f" {counts['end_of_text']}, {counts['bytes_per_token']:.3f} bytes per token, digest"
            f" {counts['tokenizer_digest']}.",
            *_describe_conversations(counts),
            f"Documents with invalid UTF-8 that was replaced: {counts['replaced_utf8']:,}.",
            *_describe_lost(counts),
            f"Files that were not read, by ending: {count_endings(counts['files_not_read']) or 'none'}.",
            "",
            "| dropped because | documents |",
            "|---|---|",
            *dropped,
            "",
            *_describe_decontamination(counts),
            "## Lengths",
            "",
            "![how many documents have how many tokens](histogram.png)",
            "",
            "| tokens | documents |",
            "|---|---|",
            *lengths,
            "",
            "## Reading them",
            "",
            "One row is one document, ended by the end-of-text token. Any Parquet reader opens them:",
            "",
            "```python",
            "import json",
            "import pyarrow.parquet as pq",
            "",
            f'ids = pq.ParquetFile("{first_shard}").read_row_group(0)["tokens"][0].as_py()[:-1]  # without the end',
            "# tokenizer.json is the tokenizer artifact's, or a checkpoint's.",
            'vocabulary = json.load(open("tokenizer.json", encoding="utf-8"))["model"]["vocab"]',
            "spelled = {token: text for text, token in vocabulary.items()}",
            "# tokenizer.json writes each byte as one printable character, as GPT-2's vocabulary does.",
            "printable = [*range(33, 127), *range(161, 173), *range(174, 256)]",
            "others = [byte for byte in range(256) if byte not in printable]",
            "byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}",
            'print(bytes(byte_of[c] for token in ids for c in spelled[token]).decode("utf-8"))',
            "```",
            "",
            "## Digests",
            "",
            "| file | bytes | SHA-256 |",
            "|---|---|---|",
            *digests,
            "",
            "## Settings",
            "",
            "```yaml",
            to_yaml(config).strip(),
            "```",
            "",
        ]
    )


def _describe_conversations(counts: Mapping[str, Any]) -> list[str]:
    if "cut" not in counts:
        return []
    splits = [counts[name] for name in ("train", "val")]
    learnt, tokens = (sum(split[kind] for split in splits) for kind in ("learnt_tokens", "tokens"))
    return [
        f"Conversations: {learnt:,} of {tokens:,} tokens are learnt, those that the assistant speaks (column `learn`)."
        f" {counts['cut']:,} conversations were cut after a whole turn to fit the context.",
    ]


def _describe_decontamination(counts: Mapping[str, Any]) -> list[str]:
    """Say by which tasks documents were dropped, and which of their items none is recognised by."""
    if "decontaminated" not in counts:
        return []
    rows = [
        f"| {task} | {found['documents']:,} | {found['items']:,} | {found['short_items']:,} |"
        for task, found in counts["decontaminated"].items()
    ]
    return [
        "## Decontamination",
        "",
        f"Dropped was every document that shares {RUN_WORDS} words in a row with an item; one that does so with several"
        " tasks is counted under the first. Items of fewer words recognise none.",
        "",
        "| task | documents | items | too short |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def load_plotting() -> tuple[Any, Any]:
    """Load matplotlib, which takes a quarter of a second; returns its canvas and its figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg, Figure


def _draw(lengths: list[int], tokenizer: str) -> bytes:
    canvas, figure_of = load_plotting()
    used = [power for power, count in enumerate(lengths) if count]
    powers = range(used[0], used[-1] + 1)
    figure = figure_of(figsize=(8, 4.5), dpi=100, layout="constrained")
    canvas(figure)
    axes = figure.add_subplot()
    axes.bar(range(len(powers)), [lengths[power] for power in powers], width=0.9, color="#3b6ea5")
    axes.set_xticks(range(len(powers)), [f"< {2**power:,}" for power in powers], rotation=45, ha="right")
    axes.set_xlabel(f"tokens in a document ({tokenizer})")
    axes.set_ylabel("documents")
    axes.set_title(f"{sum(lengths):,} documents by length")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
