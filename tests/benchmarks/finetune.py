"""Fine-tuning beside trl's `SFTTrainer`: the same start, conversations and settings; held-out answers and tokens/s.

.venv-finetune/bin/python tests/benchmarks/finetune.py --conversations seed.jsonl.zst oasst.jsonl.zst   # two minutes
.venv-finetune/bin/python tests/benchmarks/finetune.py --conversations … --start smollm2/ --device cuda --context 1024

Both learn what the assistant says and nothing else, with AdamW, the same rates, batches of about as many conversations
and the same number of epochs; theirs come padded in random order, as is `trl`'s default, ours packed. Seeds take turns.
Without --start both begin with one random model and a tokenizer made of the conversations. Held-out answers of both are
scored by this project, from the folders that they wrote.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A script run by its path sees only its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.chat import CHAT_TEMPLATE, Message, OwnTemplate, encode, load_template, render, save_template
from model.checkpoint import load_model, save_model
from model.config import LoraSettings, ModelConfig, OptimizerConfig
from model.gpt import GPT
from model.lora import adapt
from model.optimizer import build_optimizer
from model.scoring import score_batches
from model.tokenizer import Tokenizer, load_tokenizer, train_bpe
from model.training import LossModule, parallelize, train_step
from pipeline.artifacts import Artifact
from pipeline.config import SourceConfig
from pipeline.corpus.conversations import cut_length, parse_document, text_to_learn_from
from pipeline.corpus.files import slices
from pipeline.corpus.formats import read, read_pieces
from pipeline.corpus.packing import ConversationStream, ConversationValidation
from pipeline.corpus.shards import ShardWriter

HELD_OUT = 10  # every tenth conversation
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Run:
    """What one fine-tuning came to."""

    bits_per_byte: float
    tokens_per_second: float
    steps: int


@dataclass(frozen=True)
class Task:
    """What both are given."""

    options: argparse.Namespace
    start: Path
    tokenizer: Tokenizer
    train: list[list[Message]]
    val: list[list[Message]]
    tokens: int  # of the training conversations
    shards: Artifact

    @property
    def precision(self) -> torch.dtype:
        return torch.bfloat16 if self.options.device == "cuda" else torch.float32


def read_documents(paths: Sequence[str]) -> list[str]:
    source = SourceConfig(kind="conversations", paths=list(paths))
    found = []
    for slice_ in slices(source, 2**30):
        for piece in read_pieces(slice_, source, 2**30) if slice_.is_stream else [None]:
            found += [text for text, _ in read(slice_, source, piece) if text is not None]
    return found


def make_start(options: argparse.Namespace, documents: list[str], folder: Path) -> Path:
    """Return the folder to start from: as given, or a random model beside a tokenizer of the conversations."""
    if options.start:
        return Path(options.start)
    tokenizer = train_bpe([text_to_learn_from(text) for text in documents], options.vocabulary)
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=options.layers, width=options.width, num_heads=options.width // 64, context_length=options.context,
        tie_embeddings=True,
    )  # fmt: skip
    model = GPT(config, tokenizer.vocab_size)
    for block in model.blocks:  # blocks that begin as the identity would be no start that somebody has
        torch.nn.init.normal_(block.attention.output.weight, std=0.02)
        torch.nn.init.normal_(block.mlp.output.weight, std=0.02)
    save_model(folder, model, tokenizer)
    save_template(folder, CHAT_TEMPLATE)
    return folder


def prepare(options: argparse.Namespace, folder: Path) -> Task:
    documents = read_documents(options.conversations)
    start = make_start(options, documents, folder / "start")
    tokenizer, template = load_tokenizer(start), load_template(start) or OwnTemplate()
    splits: dict[str, list[list[Message]]] = {"train": [], "val": []}
    shards = Artifact(str(folder / "shards"), "prepare", "0" * 20)
    writers = {split: ShardWriter(shards, f"{split}/00000.parquet", tokenizer, conversations=True) for split in splits}
    tokens = 0
    for number, document in enumerate(documents):
        messages = parse_document(document)
        while messages:  # to both the same whole turns
            ids, learn = encode(tokenizer, render(tokenizer, template, messages))
            if messages[-1]["role"] == "assistant" and cut_length(learn, options.context)[0] == len(ids):
                break
            messages = messages[:-1]
        if not messages:
            continue
        split = "train" if number % HELD_OUT else "val"
        splits[split].append(messages)
        writers[split].add(ids, learn)
        tokens += len(ids) if split == "train" else 0
    files = {}
    for writer in writers.values():
        files |= writer.close()
    shards.commit({"train": {"learnt_tokens": 1}}, files)
    return Task(options, start, tokenizer, splits["train"], splits["val"], tokens, shards)


def ours(task: Task, seed: int, folder: Path) -> Run:
    options = task.options
    torch.manual_seed(seed)
    model = load_model(task.start, device=options.device, context_length=options.context).train()
    model.restarts_positions = True
    if options.lora_rank:
        adapt(model, LoraSettings(options.lora_rank, 2 * options.lora_rank))
    module = parallelize(model, precision=task.precision)
    stream = ConversationStream(
        task.shards, context_length=options.context, batch_sequences=options.rows, seed=seed,
        cache_folder=folder / "cache",
    )  # fmt: skip
    steps = options.epochs * stream.steps_per_epoch
    config = OptimizerConfig(
        kind="adamw", learning_rate=options.learning_rate, weight_decay=0.0, beta2=0.999, clip_norm=CLIP_NORM,
        decay_fraction=1.0, final_ratio=0.0,
    )  # fmt: skip
    optimizer = build_optimizer(model, config, steps)
    batches = stream.batches()
    began = time.perf_counter()
    for step in range(steps):
        batch = next(batches)
        train_step(
            module, optimizer, batch.split(options.micro_rows), step=step, global_tokens=batch.global_tokens,
            precision=task.precision,
        ).read()  # fmt: skip
    seconds = time.perf_counter() - began
    stream.close()
    return Run(score(task, model, folder), options.epochs * task.tokens / seconds, steps)


def theirs(task: Task, seed: int, folder: Path) -> Run:
    """The same with trl; what it wrote is read and scored as ours is."""
    import datasets
    import transformers
    import trl

    options = task.options
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.start)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = datasets.Dataset.from_list([{"messages": list(map(dict, messages))} for messages in task.train])
    # As many conversations a step as lie in a batch of ours.
    batches = ConversationStream(
        task.shards, context_length=options.context, batch_sequences=options.rows, seed=seed,
        cache_folder=folder / "cache",
    )  # fmt: skip
    per_step = max(1, round(len(task.train) / batches.steps_per_epoch))
    batches.close()
    micro = max(1, per_step * options.micro_rows // options.rows)
    peft_config = None
    if options.lora_rank:
        import peft

        peft_config = peft.LoraConfig(
            r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    settings = trl.SFTConfig(
        output_dir=str(folder / "trl"), num_train_epochs=options.epochs, per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, per_step // micro), learning_rate=options.learning_rate,
        lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0, adam_beta2=0.999, max_grad_norm=CLIP_NORM,
        assistant_only_loss=True, max_length=options.context, packing=False, seed=seed, data_seed=seed,
        bf16=options.device == "cuda", use_cpu=options.device == "cpu", save_strategy="no", report_to=[],
        logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(task.start, dtype=torch.float32)
    trainer = trl.SFTTrainer(
        model=model, args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trained: Any = trainer.model
    if options.lora_rank:
        trained = trained.merge_and_unload()
    trained.save_pretrained(folder / "trl")
    steps = trainer.state.global_step
    read_back = load_model(folder / "trl", device=options.device, context_length=options.context)
    read_back.restarts_positions = True
    return Run(score(task, read_back, folder), options.epochs * task.tokens / seconds, steps)


def score(task: Task, model: GPT, folder: Path) -> float:
    options = task.options
    held_out = ConversationValidation(
        task.shards, context_length=options.context, batch_sequences=8, cache_folder=folder / "cache"
    )
    return score_batches(LossModule(model), held_out.batches(), task.tokenizer.byte_lengths).bits_per_byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--conversations", nargs="+", required=True, help="files of conversations, such as .jsonl.zst")
    add("--start", help="a Hugging Face folder to start from, with tokenizer; else a random model")
    add("--layers", type=int, default=4, help="of the random model [%(default)s]")
    add("--width", type=int, default=256, help="of the random model [%(default)s]")
    add("--vocabulary", type=int, default=4096, help="of the random model's tokenizer [%(default)s]")
    add("--context", type=int, default=512, help="[%(default)s]")
    add("--rows", type=int, default=16, help="rows of the context in our batches [%(default)s]")
    add("--micro-rows", type=int, default=8, help="of them computed at once [%(default)s]")
    add("--epochs", type=int, default=1)
    add("--seeds", type=int, default=3)
    add("--learning-rate", type=float, default=1e-3)
    add("--lora-rank", type=int, default=0, help="train an adapter of this rank instead of all weights")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        task = prepare(options, Path(temporary))
        runs: dict[str, list[Run]] = {"ours": [], "trl": []}
        missing = ""
        for seed in range(options.seeds):
            for name, train in (("ours", ours), ("trl", theirs)):
                if missing and name == "trl":
                    continue
                try:
                    runs[name].append(train(task, seed, Path(temporary)))
                except ImportError as error:
                    missing = str(error)
        before = score(task, load_model(task.start, device=options.device), Path(temporary))
    report(options, task, runs, before, missing)


def report(options: argparse.Namespace, task: Task, runs: dict[str, list[Run]], before: float, missing: str) -> None:
    load = os.getloadavg()[0]
    learnt = "all weights" if not options.lora_rank else f"LoRA of rank {options.lora_rank}"
    print(
        f"\n{len(task.train)} conversations, {task.tokens:,} tokens, {options.epochs} epoch(s), {learnt},"
        f" {options.device}; {len(task.val)} held out, {before:.4f} bits per byte of answers before; load {load:.1f}\n"
    )
    print(f"{'':<6}{'bits per byte of held-out answers':>36}{'tokens/s':>12}{'steps':>8}")
    result: dict[str, Any] = {"load": load, "tokens": task.tokens, "seeds": options.seeds}
    for name, found in runs.items():
        if not found:
            print(f"{name:<6}missing: {missing}")
            continue
        bits = [run.bits_per_byte for run in found]
        speed = statistics.median(run.tokens_per_second for run in found)
        spread = f"{statistics.median(bits):.4f} ({min(bits):.4f} to {max(bits):.4f})"
        print(f"{name:<6}{spread:>36}{speed:>12,.0f}{found[0].steps:>8}")
        result |= {
            f"bits_per_byte_{name}": statistics.median(bits),
            f"bits_per_byte_range_{name}": max(bits) - min(bits),
            f"tokens_per_second_{name}": speed,
        }
    if runs["trl"]:
        result["bits_per_byte_difference"] = result["bits_per_byte_ours"] - result["bits_per_byte_trl"]
        pairs = zip(runs["ours"], runs["trl"], strict=True)
        result["ratio_to_trl"] = statistics.median(
            np.divide(*(run.tokens_per_second for run in pair)) for pair in pairs
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
