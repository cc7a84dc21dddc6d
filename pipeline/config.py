"""Every setting of every stage: frozen dataclasses, a preset (YAML) over them, `section.key=value` over that.

    config = load_config("jobs/presets/demo.yaml", ["train.steps=100"])

A field declared with `setting(..., affects_result=False)` says how to compute, not what: it stays out of
the fingerprints, so changing it re-runs nothing. `__post_init__` checks and never edits.

Long because all settings stand in one place, each with its meaning and its check.
"""

import dataclasses
import difflib
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from model.config import LoraSettings, ModelConfig, OptimizerConfig
from model.settings import read_value, require, setting
from model.tokenizer import NAMED_TOKENIZERS
from pipeline.presets import YamlWriter, find_preset, read_preset

# Which files hold text: ending -> format. Behind it the ending of a compression may stand.
FORMAT_OF_ENDING = {
    **dict.fromkeys((".txt", ".text", ".md"), "txt"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".warc", ".wet"), "warc"),
    **dict.fromkeys((".tar", ".tgz"), "tar"),
}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
READABLE = f"{', '.join(FORMAT_OF_ENDING)} (also with {', '.join(COMPRESSIONS)})"


KINDS_OF_CONVERSATIONS = ("conversations", "python-questions")
KINDS_OF_TEXT = ("python-docs", "files", *KINDS_OF_CONVERSATIONS, "openwebtext")
SETTINGS_OF_A_PART = ("name", "text_column", "split_text", "invalid_text", "dataset", "revision")  # in a mix
LEAST_SHARE = 0.001  # of a source in a mix


@dataclass(frozen=True)
class SourceConfig:
    kind: str = setting(
        "python-docs",
        "where documents come from: python-docs, python-questions (conversations about them), files, conversations,"
        " openwebtext, or mix: several",
    )
    paths: list[str] = setting(
        [],
        f"files, folders or globs, local, s3:// or hf://datasets/…; read are {READABLE}; for conversations .jsonl and"
        " .parquet with messages, or with prompt and completion; for openwebtext: a mirror, else the hub",
    )
    text_column: str = setting("text", "for .jsonl and .parquet: the column that holds the text")
    split_text: str = setting("files", "for .txt: one document per file (files) or per paragraph block (blank-lines)")
    invalid_text: str = setting("replace", "what to do with text that is not valid UTF-8: replace, skip or fail")
    dataset: str = setting("Skylion007/openwebtext", "for openwebtext: the name of the dataset on the hub")
    revision: str = setting("main", "for openwebtext: the hub revision (a commit hash pins it)")
    mix: list[str] = setting(
        [],
        "for mix: the sources, each WEIGHT KIND [PATH …] [SETTING=VALUE …], such as '3 conversations talks.jsonl' and"
        " '1 files books/ name=base'; weights are shares of the tokens that a training reads",
        added_later=True,
    )

    def __post_init__(self) -> None:
        kinds = (*KINDS_OF_TEXT, "mix")
        require(self.kind in kinds, f"source.kind is {self.kind!r}; it can be {', '.join(kinds)}.")
        require(bool(self.mix) == (self.kind == "mix"), "source.kind=mix and source.mix go together; set both.")
        require(not (self.mix and self.paths), "source.paths is not read with source.kind=mix; name paths in its mix.")
        for kind in ("files", "conversations"):
            require(self.kind != kind or bool(self.paths), f"source.kind={kind} needs source.paths.")
        require(all(path.strip() for path in self.paths), "source.paths holds an empty path; name a file or folder.")
        require(self.split_text in ("files", "blank-lines"), "source.split_text can be files or blank-lines.")
        policies = ("replace", "skip", "fail")
        require(self.invalid_text in policies, f"source.invalid_text can be {', '.join(policies)}.")
        parts = self.parts()
        names = [part.name for part in parts]
        for name in names:
            require(names.count(name) == 1, f"source.mix has several sources named {name!r}; give them a name=… each.")
        whole = sum(part.weight for part in parts)
        for part in parts:
            require(
                part.weight >= LEAST_SHARE * whole,
                f"source.mix gives {part.name} {part.weight / whole:.2%} of the tokens, less than {LEAST_SHARE:.1%}.",
            )

    def parts(self) -> "list[MixedSource]":
        """The sources of a mix; none of another kind."""
        return [read_mixed_source(words, self) for words in self.mix]

    @property
    def holds_conversations(self) -> bool:
        kinds = [self.kind, *(part.source.kind for part in self.parts())]
        return any(kind in KINDS_OF_CONVERSATIONS for kind in kinds)


@dataclass(frozen=True)
class MixedSource:
    """One source of a mix."""

    name: str
    weight: float  # relative to the others'
    source: SourceConfig


def read_mixed_source(words: str, whole: SourceConfig) -> MixedSource:
    """Read one item of `source.mix`; what it leaves open is as `whole` has it.

    Raises `ValueError` with one sentence that repeats the item.
    """
    where = f"source.mix holds {words!r}"
    try:
        weight_word, kind, *rest = shlex.split(words)
        weight = float(weight_word)
    except ValueError:
        raise ValueError(f"{where}; write WEIGHT KIND [PATH …] [SETTING=VALUE …], such as '3 files books/'.") from None
    require(0 < weight < math.inf, f"{where}; a weight is a number above 0.")
    require(kind in KINDS_OF_TEXT, f"{where}; its kind can be {', '.join(KINDS_OF_TEXT)}.")
    paths = []
    given = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if equals and key in SETTINGS_OF_A_PART:
            given[key] = value
        else:
            paths.append(word)
    stems = [
        re.sub(r"[^A-Za-z0-9_-]+", "", re.split(r"[.@:]", piece)[0]) for path in paths for piece in path.split("/")
    ]
    name = given.pop("name", next((stem for stem in reversed(stems) if stem), kind))
    require(
        re.fullmatch(r"[A-Za-z0-9_.-]{1,60}", name) is not None,
        f"{where}; a name has up to 60 letters, digits, '.', '_' and '-'.",
    )
    try:
        return MixedSource(name, weight, dataclasses.replace(whole, kind=kind, paths=paths, mix=[], **given))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True)
class StartConfig:
    model: str = setting(
        "",
        "weights to start from: a Hugging Face folder, local or s3://, hf://owner/name@revision, models:/name@alias or"
        " models:/name/version; empty: random ones",
        affects_result=False,  # what the fingerprints hold is the digest of its files
    )
    resolved: str = setting(
        "", "the version, commit or folder that start.model meant; noted by itself", affects_result=False
    )
    digest: str = setting("", "of the start's files; noted by itself, checked where it is given", affects_result=False)


@dataclass(frozen=True)
class TokenizerConfig:
    kind: str = setting(
        "bpe",
        "bpe (trained on the corpus), char, a name tiktoken knows, such as gpt2, or start: that of start.model, which"
        " is the default with one",
    )
    vocabulary_size: int = setting(8192, "for bpe and char: the number of tokens, special and byte tokens included")
    pattern: str = setting(
        "gpt4",
        "for bpe: how text is split before merging: gpt4, or one that llama.cpp knows (llama-bpe, qwen2, gpt2), or a"
        " regular expression",
    )
    sample_megabytes: int = setting(200, "for bpe and char: how much of the corpus is read to learn the vocabulary")

    def __post_init__(self) -> None:
        kinds = ("bpe", "char", "start", *NAMED_TOKENIZERS)
        require(self.kind in kinds, f"tokenizer.kind is {self.kind!r}; it can be {', '.join(kinds)}.")
        require(
            self.vocabulary_size >= 257,
            "tokenizer.vocabulary_size must be at least 257 (256 bytes and the end of text).",
        )
        require(self.vocabulary_size <= 2**24, "tokenizer.vocabulary_size can be 16,777,216 at most.")
        require(self.sample_megabytes > 0, "tokenizer.sample_megabytes must be positive.")

    @property
    def most_tokens(self) -> int:
        """The size of the vocabulary before it is made; a small corpus may yield fewer tokens."""
        return NAMED_TOKENIZERS.get(self.kind, self.vocabulary_size)


@dataclass(frozen=True)
class PrepareConfig:
    validation_fraction: float = setting(0.01, "share of documents, chosen by a hash of their text, held out")
    shard_tokens: int = setting(10_000_000, "about how many tokens one Parquet shard holds; also one worker's task")
    min_characters: int = setting(0, "drop documents with fewer characters")
    max_characters: int = setting(0, "drop documents with more characters; 0 keeps all")
    quality_filter: bool = setting(
        False, "drop what does not read like English prose (the rule is in pipeline/corpus/cleaning.py)"
    )
    drop_exact_duplicates: bool = setting(False, "keep only the first of documents with the same text")
    drop_near_duplicates: bool = setting(False, "keep only the first of documents that are nearly the same (MinHash)")
    near_duplicate_similarity: float = setting(
        0.8, "the share of common 5-word runs (5 characters without spaces) that makes texts the same"
    )
    decontaminate: list[str] = setting(
        [],
        "drop documents that share 13 words in a row with an item of these tasks, named as in evaluate.tasks",
        added_later=True,
    )
    workers: int = setting(0, "tasks at a time; 0 uses every CPU of the cluster", affects_result=False)

    def __post_init__(self) -> None:
        require(0 < self.validation_fraction < 1, "prepare.validation_fraction must lie between 0 and 1.")
        require(self.shard_tokens > 0, "prepare.shard_tokens must be positive.")
        require(self.min_characters >= 0, "prepare.min_characters cannot be negative.")
        require(
            self.max_characters == 0 or self.max_characters >= self.min_characters,
            "prepare.max_characters cannot be below prepare.min_characters.",
        )
        require(
            0.5 <= self.near_duplicate_similarity <= 1, "prepare.near_duplicate_similarity must lie between 0.5 and 1."
        )
        require(self.workers >= 0, "prepare.workers cannot be negative.")


@dataclass(frozen=True)
class StreamConfig:
    window_tokens: int = setting(1_000_000_000, "tokens shuffled among each other; a node keeps two such windows")
    cache_folder: str = setting(
        "", "each node's folder for decoded shards; empty: in its temporary folder", affects_result=False
    )
    cache_gigabytes: float = setting(64.0, "disk each node gives to decoded shards at most", affects_result=False)

    def __post_init__(self) -> None:
        require(self.window_tokens > 0, "stream.window_tokens must be positive.")
        require(self.cache_gigabytes > 0, "stream.cache_gigabytes must be positive.")


@dataclass(frozen=True)
class TrainConfig:
    run: str = setting("", "a fixed name for the run's folder; empty: named by its fingerprint", affects_result=False)
    steps: int = setting(1000, "optimizer steps")
    minutes: float = setting(
        0.0,
        "minutes of work in place of steps: the learning rates reach their end when the time is up; 0: steps",
        added_later=True,
    )
    extends: str = setting(
        "", "the fingerprint of a finished run to go on from; --extend finds it and sets this", added_later=True
    )
    batch_tokens: int = setting(262_144, "tokens per optimizer step, over all workers: a multiple of the context")
    micro_batch_sequences: int = setting(
        16, "sequences a worker holds in memory at once; less saves memory", affects_result=False
    )
    document_boundaries: bool = setting(False, "keep attention inside each document")
    precision: str = setting("auto", "float32, bfloat16, or auto: bfloat16 where the hardware has it")
    gradient_precision: str = setting(
        "float32",
        "in which gradients travel between workers: float32, or bfloat16 for half the bytes",
        added_later=True,
    )
    lora_rank: int = setting(
        0, "train low-rank factors of this rank beside the start's weights, which stay; 0 trains all", added_later=True
    )
    lora_alpha: float = setting(32.0, "with lora_rank: factors count lora_alpha / lora_rank", added_later=True)
    lora_targets: list[str] = setting(
        [],
        "with lora_rank: which matrices, such as [q_proj,v_proj] or [c_attn]; empty: all of the blocks",
        added_later=True,
    )
    compile: bool = setting(False, "torch.compile the model: slower to start, faster to run", affects_result=False)
    cuda_graphs: bool = setting(
        False,
        "on GPUs, not with fsdp: launch a micro-batch without document boundaries as one graph, and the update as one",
        affects_result=False,
        added_later=True,
    )
    flash_attention: str = setting(
        "2", "on GPUs: 2 (PyTorch's own), 3 (Hopper) or 4 (Blackwell)", affects_result=False, added_later=True
    )
    pointwise: str = setting(
        "torch",
        "on GPUs: whose kernels compute norms, residuals and SwiGLU: torch, or liger (needs its extra)",
        affects_result=False,
        added_later=True,
    )
    recompute_activations: bool = setting(
        False, "keep less for the backward pass and compute it again: slower, less memory", affects_result=False
    )
    device: str = setting("auto", "auto (GPUs if the fewest workers find one each), cpu or gpu", affects_result=False)
    num_workers: int | list[int] = setting(
        2, "workers, one per GPU; [least, most] grows and shrinks by itself", affects_result=False
    )
    sharding: str = setting(
        "ddp", "ddp (each worker holds the model) or fsdp (they share it out)", affects_result=False
    )
    cpus_per_worker: float = setting(1.0, "CPUs that each worker reserves in Ray", affects_result=False)
    threads_per_worker: int = setting(
        0, "CPU threads of each worker; 0 shares out the cores that may be used", affects_result=False
    )
    evaluate_every_steps: int = setting(250, "steps between evaluations on the val split")
    evaluation_tokens: int = setting(1_048_576, "val tokens scored in each of them at most; 0 scores all")
    sample_prompts: list[str] = setting(["The "], "what the model completes at each evaluation", affects_result=False)
    sample_tokens: int = setting(64, "tokens in each of these samples", affects_result=False)
    evaluate_tasks: list[str] = setting(
        [], "tasks asked as the training goes, named as in evaluate.tasks: curves in MLflow", affects_result=False
    )
    evaluate_tasks_every_steps: int = setting(
        0, "steps between two times that they are asked; 0: train.evaluate_every_steps", affects_result=False
    )
    evaluate_tasks_items: int = setting(
        200, "items asked of each task, always the same: chosen by a hash", affects_result=False
    )
    answer_questions: int = setting(
        16,
        "held-out questions answered at each evaluation, to see how many answers end by themselves; 0: none",
        affects_result=False,
        added_later=True,
    )
    answer_tokens: int = setting(
        128, "tokens within which such an answer must end", affects_result=False, added_later=True
    )
    base_text: str = setting(
        "",
        "a prepare folder of the start's own text, scored beside the answers: what is forgotten",
        affects_result=False,
        added_later=True,
    )
    checkpoint_every_steps: int = setting(
        500, "steps between checkpoints; 0 leaves it to the minutes", affects_result=False
    )
    checkpoint_every_minutes: float = setting(
        10.0, "minutes between checkpoints at most; 0: no limit", affects_result=False
    )
    keep_checkpoints: int = setting(2, "newest checkpoints to keep, beside the best one", affects_result=False)
    keep_training_state: bool = setting(
        True,
        "whether a finished run keeps its last and its best checkpoint, with which it can go on to more steps; its"
        " model stays either way",
        affects_result=False,
    )
    log_every_steps: int = setting(10, "steps between lines of progress and points in MLflow", affects_result=False)
    on_bad_loss: str = setting("stop", "when a loss is NaN or infinite: stop, or skip the batch (20 in a row at most)")
    max_restarts: int = setting(
        20, "failures of workers after which the run gives up; -1 never does", affects_result=False
    )
    resize_seconds: float = setting(
        0.0,
        "seconds between looks at whether more workers may join; 0: 120 on GPUs, 5 on CPUs",
        affects_result=False,
        added_later=True,
    )
    mlflow_patience_minutes: float = setting(
        10.0, "how long the end of a run waits for an MLflow server that is away", affects_result=False
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "micro_batch_sequences", "evaluate_every_steps", "log_every_steps"):
            require(getattr(self, name) > 0, f"train.{name} must be positive.")
        not_negative = ("evaluation_tokens", "checkpoint_every_steps", "checkpoint_every_minutes", "threads_per_worker")
        for name in (*not_negative, "resize_seconds", "evaluate_tasks_every_steps", "answer_questions"):
            require(getattr(self, name) >= 0, f"train.{name} cannot be negative.")
        require(0 <= self.minutes < math.inf, "train.minutes must be a number of minutes; 0 leaves it to train.steps.")
        require(self.evaluate_tasks_items > 0, "train.evaluate_tasks_items must be positive.")
        require(
            not self.evaluate_tasks or self.sharding == "ddp",
            "train.evaluate_tasks needs train.sharding=ddp: of a model that is shared out no worker can ask alone."
            " evaluate.tasks asks the finished one.",
        )
        require(self.answer_tokens > 0, "train.answer_tokens must be positive.")
        require(self.keep_checkpoints >= 1, "train.keep_checkpoints must be at least 1.")
        require(self.sample_tokens > 0, "train.sample_tokens must be positive.")
        require(self.cpus_per_worker > 0, "train.cpus_per_worker must be positive.")
        require(self.lora_rank >= 0, "train.lora_rank cannot be negative; 0 trains all weights.")
        require(0 < self.lora_alpha < math.inf, "train.lora_alpha must be a positive number.")
        require(self.max_restarts >= -1, "train.max_restarts must be -1 or more.")
        _check_choice("train.precision", self.precision, ("auto", "float32", "bfloat16"))
        _check_choice("train.gradient_precision", self.gradient_precision, ("float32", "bfloat16"))
        _check_choice("train.flash_attention", self.flash_attention, ("2", "3", "4"))
        _check_choice("train.pointwise", self.pointwise, ("torch", "liger"))
        _check_choice("train.sharding", self.sharding, ("ddp", "fsdp"))
        _check_choice("train.device", self.device, ("auto", "cpu", "gpu"))
        _check_choice("train.on_bad_loss", self.on_bad_loss, ("stop", "skip"))
        require(
            re.fullmatch(r"[A-Za-z0-9._-]{0,100}", self.run) is not None,
            f"train.run is {self.run!r}; use up to 100 letters, digits, '.', '_' and '-'.",
        )
        workers = [self.num_workers] * 2 if isinstance(self.num_workers, int) else self.num_workers
        require(
            len(workers) == 2 and 0 < workers[0] <= workers[1],
            f"train.num_workers is {self.num_workers!r}; use a positive number or [least, most].",
        )

    @property
    def lora(self) -> LoraSettings | None:
        return LoraSettings(self.lora_rank, self.lora_alpha, tuple(self.lora_targets)) if self.lora_rank else None

    @property
    def fewest_workers(self) -> int:
        return int(self.num_workers[0] if isinstance(self.num_workers, list) else self.num_workers)

    @property
    def most_workers(self) -> int:
        return int(self.num_workers[-1] if isinstance(self.num_workers, list) else self.num_workers)


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, f"{key} is {value!r}; it can be {', '.join(choices[:-1])} or {choices[-1]}.")


@dataclass(frozen=True)
class EvaluateConfig:
    max_tokens: int = setting(10_000_000, "validation tokens scored at most; 0 scores all of them")
    batch_sequences: int = setting(16, "sequences scored at once", affects_result=False)
    prompts: list[str] = setting(["The ", "In the year", "She said"], "what the model completes for its samples")
    sample_tokens: int = setting(100, "tokens in each sample")
    answer_questions: int = setting(
        64, "held-out questions answered, to see how many answers end by themselves; 0: none", added_later=True
    )
    answer_tokens: int = setting(256, "tokens within which such an answer must end", added_later=True)
    tasks: list[str] = setting(
        [],
        "tasks: blimp, lambada_openai, arc_easy, hellaswag, piqa, wikitext2, name=file, or a file of your own",
        added_later=True,
    )

    def __post_init__(self) -> None:
        require(self.max_tokens >= 0, "evaluate.max_tokens cannot be negative.")
        require(self.batch_sequences > 0, "evaluate.batch_sequences must be positive.")
        require(self.sample_tokens > 0, "evaluate.sample_tokens must be positive.")
        require(self.answer_questions >= 0, "evaluate.answer_questions cannot be negative.")
        require(self.answer_tokens > 0, "evaluate.answer_tokens must be positive.")


GATES = ("better", "not_worse", "always")
CHALLENGER = "challenger"  # the alias of the version that was refused last


@dataclass(frozen=True)
class RegisterConfig:
    model_name: str = setting("", "the registered model's name in MLflow; empty: the pipeline's name")
    alias: str = setting("champion", "the alias that the new version takes, if it earns it", affects_result=False)
    gate: str = setting(
        "better", "what a version must be to take the alias: better, not_worse, or always anything", added_later=True
    )
    least_gain: float = setting(0.001, "bits per byte that count as better, or as worse", added_later=True)
    gate_documents: int = setting(
        1000, "held-out documents that both versions are measured on, at most", added_later=True
    )
    force: bool = setting(False, "take the alias whatever the gate says; that is recorded", affects_result=False)

    def __post_init__(self) -> None:
        # MLflow's own rules, said before hours of training and not after.
        require(
            re.fullmatch(r"([^\W_][\w .-]{0,249})?", self.model_name) is not None,
            f"register.model_name is {self.model_name!r}; use up to 250 letters, digits, spaces, '.', '_' and '-'.",
        )
        require(
            re.fullmatch(r"[\w-]{1,255}", self.alias) is not None
            and re.fullmatch(r"latest|v\d+", self.alias, re.IGNORECASE) is None,
            f"register.alias is {self.alias!r}; use letters, digits, '_' and '-', and neither 'latest' nor 'v1'.",
        )
        require(
            self.alias != CHALLENGER, f"register.alias cannot be {CHALLENGER!r}: a version that is refused takes it."
        )
        _check_choice("register.gate", self.gate, GATES)
        require(self.least_gain >= 0, "register.least_gain cannot be negative.")
        require(self.gate_documents > 0, "register.gate_documents must be positive.")


@dataclass(frozen=True)
class ServeConfig:
    host: str = setting("127.0.0.1", "the address to listen on; without API keys only this machine's own is used")
    port: int = setting(8000, "the port to listen on")
    versions: list[str] = setting(["champion"], "what to serve: aliases, which are followed, or version numbers")
    open_access: bool = setting(False, "let anybody who reaches the port use it without an API key")
    replicas: int = setting(1, "copies of the model; with max_replicas the fewest")
    max_replicas: int = setting(0, "autoscaling: the most copies; 0 keeps the number fixed")
    target_ongoing_requests: float = setting(12.0, "autoscaling: requests that one copy should have at a time")
    downscale_delay_seconds: float = setting(600.0, "autoscaling: how long a copy stays after it was last needed")
    cpus_per_replica: float = setting(1.0, "logical CPUs that Ray sets aside for each copy")
    gpus_per_replica: float = setting(0.0, "GPUs for each copy; fractions share one")
    threads: int = setting(0, "CPU threads of each copy; 0 takes every core that may be used")
    backend: str = setting("engine", "what generates: engine (ours) or vllm (the extra gpt-53m[vllm])")
    weights: str = setting("auto", "auto (bfloat16 where it is fast), float32, bfloat16 or int8")
    max_batch_size: int = setting(0, "texts generated at once by each copy; 0: 16, and 128 on a GPU")
    max_queue: int = setting(64, "texts waiting at most in each copy; past it the answer is 429")
    cache_bytes: int = setting(
        0, "each copy's KV cache at most, taken as it starts; 0: 1 GiB, half of a GPU's free memory"
    )
    prefill_chunk_tokens: int = setting(0, "prompt tokens that one step reads at most; 0: 256, and 2,048 on a GPU")
    deadline_seconds: float = setting(120.0, "a request that has not ended by then ends with an error")
    max_body_bytes: int = setting(4 * 2**20, "the largest request body")
    watch_seconds: float = setting(10.0, "how often the aliases are looked up; 0: never")
    probe_tolerance: float = setting(
        0.02, "share by which a new version's bits per byte may differ from the registry's"
    )
    mlflow_pages: str = setting("", "where people open MLflow's pages, for links to runs; empty: the tracking server")
    access_log: bool = setting(False, "log every request")

    def __post_init__(self) -> None:
        require(0 < self.port < 65536, "serve.port must lie between 1 and 65535.")
        _check_choice("serve.backend", self.backend, ("engine", "vllm"))
        require(
            self.backend == "engine" or self.weights != "int8",
            "serve.weights=int8 is our engine's; serve.backend=vllm takes auto, float32 or bfloat16.",
        )
        require(bool(self.versions), "serve.versions needs at least one alias or version number.")
        require(len(set(self.versions)) == len(self.versions), "serve.versions names a version twice.")
        require(
            not self.mlflow_pages or re.match(r"https?://\S+$", self.mlflow_pages) is not None,
            "serve.mlflow_pages must be an address such as http://127.0.0.1:5000.",
        )
        require(all(re.fullmatch(r"[\w.-]+", each) for each in self.versions), "serve.versions: letters, digits, . _ -")
        sizes = ("replicas", "max_queue", "max_body_bytes")
        measures = ("deadline_seconds", "target_ongoing_requests", "downscale_delay_seconds", "probe_tolerance")
        for name in (*sizes, *measures):
            require(getattr(self, name) > 0, f"serve.{name} must be positive.")
        left_open = ("max_batch_size", "cache_bytes", "prefill_chunk_tokens")
        for name in ("cpus_per_replica", "gpus_per_replica", "threads", "watch_seconds", *left_open):
            require(getattr(self, name) >= 0, f"serve.{name} cannot be negative.")
        require(
            self.max_replicas == 0 or self.max_replicas >= self.replicas,
            "serve.max_replicas cannot be below serve.replicas.",
        )


@dataclass(frozen=True)
class SearchConfig:
    space: list[str] = setting(
        [],
        "what is tried, a text for each dimension: 'train.batch_tokens = 2048 | 4096', 'model.width, model.num_heads ="
        " 128,2 | 192,3', 'optimizer.muon_learning_rate = log 0.005 .. 0.08' (without log: evenly)",
    )
    trials: int = setting(0, "how many points of the space are tried beside the preset itself; 0: all of a finite one")
    trial_tokens: int = setting(0, "tokens that each trial trains on; 0: as many as the preset")
    algorithm: str = setting("random", "how points are chosen: random, or optuna (TPE; the extra `search`)")
    scheduler: str = setting("none", "none: each trial to its end; asha: the worse ones are stopped early")
    reduction: int = setting(3, "asha: of how many trials one goes on at each rung")
    concurrent: int = setting(0, "trials at a time; 0: as many as find room on the cluster", affects_result=False)
    budget_tokens: int = setting(0, "tokens of all trials together; 0: no limit")
    budget_minutes: float = setting(
        0.0, "minutes of one start in which points are tried; 0: no limit", affects_result=False
    )
    seeds: int = setting(3, "fresh seeds with which the best two and the preset are trained at its size; 0: no truth")
    widths: int | list[int] = setting(
        [], "model.width of a ladder of smaller models, to predict the preset's loss from"
    )

    def __post_init__(self) -> None:
        for name in ("trials", "trial_tokens", "concurrent", "budget_tokens", "budget_minutes", "seeds"):
            require(getattr(self, name) >= 0, f"search.{name} cannot be negative.")
        _check_choice("search.algorithm", self.algorithm, ("random", "optuna"))
        _check_choice("search.scheduler", self.scheduler, ("none", "asha"))
        require(self.reduction >= 2, "search.reduction must be at least 2.")
        require(self.seeds != 1, "search.seeds must be 0, or 2 and more: one figure has no interval.")
        widths = self.ladder
        require(
            len(set(widths)) == len(widths) != 1 and all(width > 0 for width in widths),
            "search.widths needs two or more different positive widths, or none.",
        )

    @property
    def ladder(self) -> list[int]:
        return self.widths if isinstance(self.widths, list) else [self.widths]


@dataclass(frozen=True)
class Config:
    name: str = setting("gpt", "the pipeline's name: its folder under storage, its MLflow experiment, its model")
    storage: str = setting("artifacts", "the storage root: a local folder or s3://bucket/prefix", affects_result=False)
    seed: int = setting(1337, "seeds the weights, the dropout and the order of the data")
    source: SourceConfig = field(default_factory=SourceConfig)
    start: StartConfig = field(default_factory=StartConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    register: RegisterConfig = field(default_factory=RegisterConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", self.name) is not None,
            f"name is {self.name!r}; use up to 63 lower-case letters, digits, '.', '_' and '-',"
            " starting with a letter or digit.",
        )
        require(
            re.match(r"s3://[^/]|file:///|(?!.*:/).", self.storage) is not None,
            f"storage is {self.storage!r}; use a local folder or s3://bucket/prefix.",
        )
        require(0 <= self.seed < 2**63, "seed must be at least 0 and below 2^63.")
        require(
            self.tokenizer.kind != "start" or self.start.model,
            "tokenizer.kind=start is the tokenizer of start.model, which is empty; name the weights to start from.",
        )
        require(
            self.train.lora is None or self.start.model,
            "train.lora_rank trains factors beside weights that stay; name them in start.model.",
        )
        require(
            self.train.lora is None or self.optimizer.kind == "adamw",
            "train.lora_rank trains factors with AdamW, as Muon is for whole matrices; set optimizer.kind=adamw.",
        )
        require(
            not (self.train.cuda_graphs and self.train.recompute_activations and self.model.dropout),
            "train.cuda_graphs cannot record activations that are computed again with dropout; set"
            " train.recompute_activations=false or model.dropout=0.",
        )
        if not self.start.model or self.start.digest:  # else the context is still to be read from the start
            self._check_lengths()

    def _check_lengths(self) -> None:
        """What must fit the context, said before the stages that come first have run."""
        context, batch, workers = self.model.context_length, self.train.batch_tokens, self.train.most_workers
        require(
            batch % context == 0, f"train.batch_tokens is {batch}, not a multiple of model.context_length, {context}."
        )
        require(
            batch // context >= workers,
            f"train.batch_tokens={batch} is {batch // context} sequences of {context}, too few for {workers} workers;"
            f" raise it, or lower train.num_workers.",
        )
        for key, prompts, tokens in (
            ("train.sample_tokens", self.train.sample_prompts, self.train.sample_tokens),
            ("evaluate.sample_tokens", self.evaluate.prompts, self.evaluate.sample_tokens),
        ):
            require(
                not prompts or tokens < context,
                f"{key} is {tokens}, which with the prompt before it does not fit model.context_length, {context};"
                f" lower it.",
            )

    @property
    def registered_name(self) -> str:
        """The registered model's name in MLflow: as set, or the pipeline's."""
        return self.register.model_name or self.name


def load_config(preset: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a preset over the defaults, then `section.key=value` overrides over the preset.

    What `start.model` says of the model is not in it: that is `load_started_config` of training/start.py.
    Raises `ValueError` with one sentence that names the setting, and a suggestion where one is near.
    """
    return build_config(read_settings(preset, overrides))


def read_settings(preset: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings that are given, by their dotted keys; those of `overrides` replace those of the preset."""
    values: dict[str, Any] = {}
    if preset is not None:
        path = find_preset(preset)
        try:
            given_by_key = read_preset(path)
            for section in sections_of_settings() & {key for key, given in given_by_key.items() if given == ""}:
                del given_by_key[section]  # nothing stands in it
            values |= {key: _read(key, given) for key, given in given_by_key.items()}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for override in overrides:
        key, equals, given = override.partition("=")
        require(bool(equals), f"{override!r} is not a setting; write section.key=value.")
        values[key.strip()] = _read(key.strip(), given)
    return values


def build_config(values: Mapping[str, Any]) -> Config:
    """Put settings over the defaults, and check them all."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    top = sections.pop("", {})
    kinds = get_type_hints(Config)
    return Config(**top, **{section: kinds[section](**given) for section, given in sections.items()})


def with_settings(config: Config, given: Mapping[str, str]) -> Config:
    """Return a config with other values, each a text under its dotted key.

    Raises `ValueError` as `load_config` does.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key, text in given.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = _read(key, text)
    top = sections.pop("", {})
    changed = {section: dataclasses.replace(getattr(config, section), **values) for section, values in sections.items()}
    return dataclasses.replace(config, **top, **changed)


def _read(key: str, given: Any) -> Any:
    _check_key(key)
    try:
        return read_value(given, kinds_of_settings()[key])
    except ValueError as error:
        raise ValueError(f"{key} is {given!r}; it {error}.") from None


@cache
def kinds_of_settings() -> dict[str, Any]:
    """The type of every setting, by its dotted key."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            kinds |= {f"{name}.{leaf}": leaf_kind for leaf, leaf_kind in get_type_hints(kind).items()}
        else:
            kinds[name] = kind
    return kinds


def sections_of_settings() -> set[str]:
    return {key.partition(".")[0] for key in kinds_of_settings() if "." in key}


def describe_settings() -> list[tuple[str, Any, str]]:
    """List every setting as (dotted key, default, meaning), in declaration order."""
    rows = []
    defaults = Config()
    for key_field in dataclasses.fields(Config):
        value = getattr(defaults, key_field.name)
        if dataclasses.is_dataclass(value):
            rows += [
                (f"{key_field.name}.{leaf.name}", getattr(value, leaf.name), leaf.metadata.get("meaning", ""))
                for leaf in dataclasses.fields(value)
            ]
        else:
            rows.append((key_field.name, value, key_field.metadata.get("meaning", "")))
    return rows


def result_settings(section: Any) -> dict[str, Any]:
    """Return the settings of one section that decide its result: what a fingerprint is made of."""
    return {
        leaf.name: getattr(section, leaf.name)
        for leaf in dataclasses.fields(section)
        if leaf.metadata.get("affects_result", True)
        and not (leaf.metadata.get("added_later") and getattr(section, leaf.name) == _default(leaf))
    }


def _default(leaf: dataclasses.Field[Any]) -> Any:
    return leaf.default if leaf.default_factory is dataclasses.MISSING else leaf.default_factory()


def to_yaml(config: Config) -> str:
    """Write the resolved config as YAML that `load_config` reads back."""
    return yaml.dump(dataclasses.asdict(config), Dumper=YamlWriter, sort_keys=False, allow_unicode=True)


def _check_key(key: str) -> None:
    known = list(kinds_of_settings())
    if key in known:
        return
    if key in sections_of_settings():
        raise ValueError(f"{key} is a section; give its settings values: {key}.<setting>=<value>, or nested in YAML.")
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f" Did you mean {near[0]!r}?" if near else " See --help for all of them."
    raise ValueError(f"There is no setting {key!r}.{hint}")
