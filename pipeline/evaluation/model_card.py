"""What a person, and the hub, want to know of a model: one text from what the stages' manifests say.

card = write_card(Facts(config, prepared=…, trained=…, evaluation=…))
folder.write(README, card)                                  # the Hugging Face folder's README.md
client.update_model_version(..., description=summarise_card(card))

What is not known (tasks that nobody asked, samples of a training that is not evaluated yet) has no section.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.artifacts import Artifact, Manifest
from pipeline.config import Config, result_settings

README = "README.md"
LONGEST_DESCRIPTION = 4900  # characters; MLflow's database holds 5,000
LONGEST_SAMPLE = 400
HF_FAMILIES = {"modern": "Qwen3", "classic": "GPT-2"}
BITS = "bits_per_byte"


@dataclass(frozen=True)
class Facts:
    """What is known of a model: its config, and what the stages counted."""

    config: Config
    trained: Mapping[str, Any]
    prepared: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # evaluation.json
    data_digest: str = ""
    training_digest: str = ""

    @classmethod
    def of(cls, config: Config, prepared: Artifact, trained: Manifest, evaluated: Artifact | None = None) -> "Facts":
        """Read them from the stages' artifacts."""
        shards = prepared.manifest()
        evaluation = {}
        if evaluated is not None and evaluated.exists("evaluation.json"):
            evaluation = json.loads(evaluated.read_text("evaluation.json"))
        counts = {} if shards is None else shards.counts
        return cls(config, trained.counts, counts, evaluation, prepared.fingerprint, trained.fingerprint)


def write_card(facts: Facts) -> str:
    """Return the card as Markdown, with the hub's metadata before it."""
    sections = (_data, _recipe, _score, _tasks, _samples, _use)
    lines = [line for section in sections for line in section(facts)]
    return "\n".join([_metadata(facts), f"# {facts.config.registered_name}", "", *_introduce(facts), *lines])


def summarise_card(card: str) -> str:
    """Return a card as MLflow's description of a version: without the hub's metadata, and no longer than fits."""
    text = re.sub(r"\A---\n.*?\n---\n+", "", card, flags=re.DOTALL)
    if len(text) > LONGEST_DESCRIPTION:
        text = text[: LONGEST_DESCRIPTION - 80].rpartition("\n")[0] + f"\n\n… the rest is in the model's {README}.\n"
    return text


def _metadata(facts: Facts) -> str:
    """The head that the hub reads: how to open the model, and its figures."""
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": task, "type": task},
            "metrics": [
                {"type": name, "name": name, "value": round(figure["value"], 5)}
                for name, figure in described["metrics"].items()
                if figure["value"] is not None
            ],
        }
        for task, described in facts.evaluation.get("tasks", {}).items()
    ]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"model-index": [{"name": facts.config.registered_name, "results": results}]} if results else {}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def _introduce(facts: Facts) -> list[str]:
    model, trained = facts.config.model, facts.trained
    size = f"{trained['num_parameters']:,} parameters" if "num_parameters" in trained else "A GPT"
    return [
        f"{size}: {model.num_layers} blocks of width {model.width}, {model.context_length:,} tokens of context."
        f" Opens as {HF_FAMILIES[model.family]}.",
        "",
    ]


def _data(facts: Facts) -> Iterator[str]:
    source, splits = facts.config.source, [(name, facts.prepared.get(name)) for name in ("train", "val")]
    where = source.dataset if source.kind == "openwebtext" and not source.paths else ", ".join(source.paths)
    yield from ("## Data", "", f"Source: {source.kind}{f' ({where})' if where else ''}.")
    if facts.data_digest:
        yield f"Shards: `{facts.data_digest}`."
    if "tokenizer" in facts.prepared:
        size = f"{facts.prepared['vocabulary_size']:,} tokens, {facts.prepared['bytes_per_token']:.2f} bytes each"
        yield f"Tokenizer: {facts.prepared['tokenizer']}, {size}."
    yield ""
    if all(split for _, split in splits):
        yield from ("| split | documents | bytes | tokens |", "|---|---|---|---|")
        for name, split in splits:
            assert split is not None
            yield f"| {name} | {split['documents']:,} | {split['bytes']:,} | {split['tokens']:,} |"
        yield ""
    dropped = [
        f"{task} ({found['documents']:,} documents)" for task, found in facts.prepared.get("decontaminated", {}).items()
    ]
    if dropped:
        yield from (f"Without the documents that hold items of {', '.join(dropped)}.", "")


def _recipe(facts: Facts) -> Iterator[str]:
    config, trained = facts.config, facts.trained
    train, optimizer = config.train, config.optimizer
    rate = optimizer.muon_learning_rate if optimizer.kind == "muon" else optimizer.learning_rate
    told = [
        f"{trained.get('steps', train.steps):,} steps of {train.batch_tokens:,} tokens",
        f"{optimizer.kind}, learning rate {rate:g}, {optimizer.schedule}",
        f"seed {config.seed}",
    ]
    if "precision" in trained:
        told.append(f"in {trained['precision']} on a {'GPU' if trained['device'] == 'cuda' else 'CPU'}")
    if "seconds" in trained:
        told.append(f"{sum(trained['seconds'].values()) / 60:,.1f} minutes")
    yield from ("## Recipe", "", f"{'; '.join(told)}.", "")
    if facts.training_digest:
        yield from (f"Training: `{facts.training_digest}`.", "")
    chosen = _chosen_settings(config)
    if chosen:
        yield from ("Settings that differ from the defaults:", "", "```yaml", *chosen, "```", "")


def _chosen_settings(config: Config) -> list[str]:
    """What a preset would have to say for the same weights."""
    defaults, lines = Config(), []
    for name in ("tokenizer", "prepare", "model", "optimizer", "stream", "train"):
        given, usual = result_settings(getattr(config, name)), result_settings(getattr(defaults, name))
        lines += [f"{name}.{key}: {json.dumps(value)}" for key, value in given.items() if value != usual.get(key)]
    return lines


def _score(facts: Facts) -> Iterator[str]:
    yield from ("## Score", "")
    if BITS in facts.evaluation:
        found = facts.evaluation
        over = f" over {found['tokens']:,} tokens ({found['bytes']:,} bytes)" if "tokens" in found else ""
        yield f"{found[BITS]:.4f} bits per byte of held-out text{over}."
    elif BITS in facts.trained:
        yield f"{facts.trained[BITS]:.4f} bits per byte of held-out text, as the training measured it."
    yield ""


def _tasks(facts: Facts) -> Iterator[str]:
    """Every figure of every task, with n and standard error."""
    tasks = facts.evaluation.get("tasks", {})
    if not tasks:
        return
    yield from ("## Tasks", "", "| task | metric | value | standard error | n | chance |", "|---|---|---|---|---|---|")
    for task, described in tasks.items():
        for metric, figure in described["metrics"].items():
            chance = described["chance"] if metric.startswith("acc") and described["chance"] else None
            cells = (_figure(figure["value"]), _figure(figure["standard_error"]), f"{figure['n']:,}", _figure(chance))
            yield f"| {task} | {metric} | {' | '.join(cells)} |"
    yield from ("", "As lm-eval defines them, without examples in the prompt.", "")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _samples(facts: Facts) -> Iterator[str]:
    """What it writes, quoted: a sample may hold anything, Markdown and HTML too."""
    samples = facts.evaluation.get("samples", [])
    if samples:
        yield from ("## Samples", "")
    for sample in samples:
        text = (sample["prompt"] + sample["text"])[:LONGEST_SAMPLE].replace("```", "'''")
        yield from ("```text", text, "```", "")


def _use(facts: Facts) -> Iterator[str]:
    yield from (
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # where this file lies',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        f"ids = tokenizer({json.dumps((facts.config.evaluate.prompts or ['The'])[0])}, return_tensors='pt')",
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))",
        "```",
        "",
    )
