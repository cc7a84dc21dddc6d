"""One training of nanoGPT on the text of one of ours: how much sooner ours had nanoGPT's last score.

    git clone https://github.com/karpathy/nanoGPT
    .venv/bin/python -m jobs.pipeline books source.paths=[books.jsonl.zst]
    .venv/bin/python tests/benchmarks/nanogpt.py --nanogpt nanoGPT --storage artifacts --name books --minutes 60 \\
        n_layer=4 n_embd=192

nanoGPT's own train.py trains its character-level model, on the documents that ours trained on, and is scored on those
that ours held out, in windows of its own context. Its schedule is fitted to the minutes by timing some iterations
first. Our curve is that of the finished training in --storage; run both on the same machine, one after the other.
"""

import argparse
import json
import math
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

# A script run by its path sees only its own folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.tokenizer import Tokenizer, load_tokenizer

# nanoGPT's recipe for a CPU (its README), wider and with more context, for an hour instead of three minutes.
SETTINGS = {
    "device": "cpu",
    "dtype": "float32",  # nanoGPT has no other on a CPU
    "compile": "True",
    "eval_iters": "40",
    "log_interval": "50",
    "block_size": "256",
    "batch_size": "16",
    "gradient_accumulation_steps": "1",
    "n_layer": "4",
    "n_head": "4",
    "n_embd": "192",
    "dropout": "0.0",
    "learning_rate": "1e-3",
    "min_lr": "1e-4",
    "beta2": "0.99",
    "warmup_iters": "100",
    "always_save_checkpoint": "True",
}
TIMED_ITERATIONS = 150
EVALUATIONS = 12
SCORE = """
import torch, numpy as np
from model import GPT, GPTConfig
kept = torch.load("out/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**kept["model_args"]))
model.load_state_dict({name.removeprefix("_orig_mod."): weight for name, weight in kept["model"].items()})
model.eval()
size = kept["model_args"]["block_size"]
held_out = torch.from_numpy(np.fromfile("data/text/val.bin", dtype=np.uint16).astype(np.int64))
nats = 0.0
with torch.no_grad():
    for start in range(0, len(held_out) - 1, size):
        window = held_out[start : start + size + 1][None]
        _, loss = model(window[:, :-1].contiguous(), window[:, 1:].contiguous())
        nats += loss.item() * (window.numel() - 1)
print("scored", nats, sum(weight.numel() for weight in model.parameters()))
"""


def find_stage(storage: Path, name: str, stage: str) -> Path:
    """The finished artifact of a stage, the newest if there are several."""
    found = sorted(storage.glob(f"{name}/{stage}-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(
            f"{storage} holds no finished {stage} of {name!r}; train it first, as the top of this file says."
        )
    return found[-1].parent


def read_split(shards: Path, tokenizer: Tokenizer, split: str) -> str:
    """The documents of a split with an empty line between them, as nanoGPT's text files have it."""
    texts = []
    for path in sorted(shards.glob(f"{split}/*.parquet")):
        for ids in pq.read_table(path)["tokens"].to_pylist():
            texts.append(tokenizer.decode(ids[:-1]))
    return "\n\n".join(texts)


def write_data(folder: Path, train: str, val: str) -> None:
    """Write train.bin, val.bin and meta.pkl as nanoGPT's data/shakespeare_char/prepare.py does."""
    characters = sorted(set(train) | set(val))
    code = {character: number for number, character in enumerate(characters)}
    folder.mkdir(parents=True)
    for name, text in (("train", train), ("val", val)):
        np.fromiter(map(code.__getitem__, text), dtype=np.uint16, count=len(text)).tofile(folder / f"{name}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters), "stoi": code, "itos": characters}))


@dataclass
class Training:
    """What train.py printed: when it evaluated, and how long single iterations took."""

    seconds: list[float] = field(default_factory=list)  # since the start, at each evaluation's end
    iteration_seconds: list[float] = field(default_factory=list)


def train(folder: Path, settings: dict[str, str]) -> Training:
    """Run train.py to its end, and say when it evaluates."""
    process = subprocess.Popen(
        [sys.executable, "-u", "train.py", *(f"--{key}={value}" for key, value in settings.items())],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    began, seen, lines = time.perf_counter(), Training(), []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step "):
            seen.seconds.append(time.perf_counter() - began)
            print(f"nanoGPT   {seen.seconds[-1] / 60:6.1f} min   {line.strip()}", flush=True)
        elif found := re.match(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", line):
            seen.iteration_seconds.append(float(found[1]) / 1000)
    if process.wait():
        raise SystemExit("".join(lines[-20:]))
    return seen


def read_curve(artifact: Path) -> tuple[list[tuple[float, float]], float]:
    """Our held-out bits per byte over minutes of work, and the minutes of all."""
    progress = max(artifact.glob("checkpoints/*/progress.json"), key=lambda path: path.stat().st_mtime)
    history = json.loads(progress.read_text())
    minutes = sum(
        history["seconds"].get(name, 0.0) for name in ("compute", "data_wait", "evaluation", "tasks", "checkpoint")
    )
    minutes /= 60
    return [(minutes * step / history["step"], score) for step, _, score in history["validation"]], minutes


def minutes_until(curve: list[tuple[float, float]], score: float) -> float:
    """When the curve first was at or below a score, on a straight line between its points; infinite if never."""
    if curve[0][1] <= score:
        return curve[0][0]
    for (before, worse), (after, better) in pairwise(curve):
        if better <= score:
            return before + (after - before) * (worse - score) / (worse - better)
    return math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--storage", type=Path, required=True, help="where our training lies")
    parser.add_argument("--name", default="books")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of nanoGPT's train.py")
    options = parser.parse_args()
    settings = SETTINGS | dict(setting.split("=", 1) for setting in options.settings)

    shards = find_stage(options.storage, options.name, "prepare")
    tokenizer = load_tokenizer(find_stage(options.storage, options.name, "tokenizer"))
    curve, our_minutes = read_curve(find_stage(options.storage, options.name, "train"))
    texts = {split: read_split(shards, tokenizer, split) for split in ("train", "val")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("train.py", "model.py", "configurator.py"):
            (folder / name).write_text((options.nanogpt / name).read_text())
        write_data(folder / "data/text", texts["train"], texts["val"])
        settings |= {"dataset": "text", "out_dir": "out"}

        short = {"max_iters": TIMED_ITERATIONS, "eval_interval": TIMED_ITERATIONS // 2, "log_interval": 7}
        tried = train(folder, settings | {key: str(value) for key, value in short.items()})
        iteration = statistics.median(tried.iteration_seconds)
        evaluation = max(0.0, tried.seconds[-1] - tried.seconds[-2] - TIMED_ITERATIONS // 2 * iteration)
        rest = 60 * options.minutes - tried.seconds[0] - EVALUATIONS * evaluation
        iterations = int(rest / iteration)
        if iterations < 10 * EVALUATIONS:
            raise SystemExit(f"{options.minutes:g} minutes leave {max(iterations, 0)} iterations; give it more.")
        print(f"nanoGPT   {iterations:,} iterations of {1000 * iteration:.0f} ms", flush=True)
        whole = {"max_iters": iterations, "lr_decay_iters": iterations, "eval_interval": iterations // EVALUATIONS}
        began = time.perf_counter()
        train(folder, settings | {key: str(value) for key, value in whole.items()})
        minutes = (time.perf_counter() - began) / 60
        scored = subprocess.run(
            [sys.executable, "-c", SCORE], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
    nats, parameters = re.search(r"scored (\S+) (\d+)", scored).groups()  # type: ignore[union-attr]
    theirs = float(nats) / math.log(2) / len(texts["val"].encode())
    ours = curve[-1][1]
    sooner = minutes_until(curve, theirs)
    print(f"nanoGPT   {theirs:.4f} bits per byte after {minutes:.1f} minutes, {int(parameters):,} parameters")
    print(f"ours      {ours:.4f} bits per byte after {our_minutes:.1f} minutes")
    times = minutes / sooner if sooner else math.inf
    print(f"ours      {theirs:.4f} after {sooner:.1f}: {times:.1f} times sooner")
    print(
        json.dumps(
            {
                "bits_per_byte": ours,
                "bits_per_byte_nanogpt": theirs,
                "minutes": our_minutes,
                "minutes_nanogpt": minutes,
                "minutes_until_its_score": sooner,
                "times_sooner": times,
            }
        )
    )


if __name__ == "__main__":
    main()
