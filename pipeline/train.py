"""Train the GPT on the token shards: Ray Train's workers, DDP, one MLflow run, checkpoints that nothing breaks.

    python -m jobs.train jobs/presets/demo.yaml

`run` is the driver; `train_worker` is what every worker does, top to bottom: data, model, optimizer, resume,
loop, report. Which tokens a step sees and which randomness it uses are functions of (seed, step) alone, so a
run that was killed anywhere goes on from its last checkpoint as if it had never stopped.
"""

import gc
import hashlib
import json
import logging
import math
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load_file

from model.budget import Memory, estimate_memory
from model.checkpoint import (
    WEIGHTS,
    export_weights,
    import_weights,
    load_training_state,
    save_training_state,
    write_model,
)
from model.cores import count_cores
from model.generation import complete
from model.gpt import GPT
from model.optimizer import Optimizer, build_optimizer
from model.sampling import SamplingSettings
from model.tokenizer import Tokenizer, load_tokenizer
from model.training import (
    ONE_HEAP,
    LossModule,
    StepMeasures,
    autocast,
    bits_per_byte,
    choose_precision,
    count_shares,
    parallelize,
    train_step,
)
from pipeline import tracking
from pipeline.artifacts import Artifact, FileRecord, Manifest, describe_difference
from pipeline.config import Config, result_settings, to_yaml
from pipeline.corpus.stream import TokenStream, ValidationStream
from pipeline.tracking import Tracker
from pipeline.training.checkpoints import BackgroundWriter, CheckpointStore
from pipeline.training.gauges import TrainingGauges
from pipeline.training.goodput import TimeSplit, memory_metrics, peak_flops, weight_norm
from pipeline.training.line import FailureNotes, Line, LineHandler
from pipeline.training.loss_plot import draw_loss

FORMAT_VERSION = 1
RUN_FILE = "run.json"  # which MLflow run and which settings an unfinished training belongs to
EXPORTED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def settings(config: Config) -> dict[str, Any]:
    sections = {
        "model": config.model, "optimizer": config.optimizer, "stream": config.stream, "train": config.train
    }  # fmt: skip
    return tracking.flatten({name: result_settings(section) for name, section in sections.items()}) | {
        "seed": config.seed
    }


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    config: Config
    shards: Artifact
    tokenizer: Artifact
    output: Artifact
    vocab_size: int
    bytes_per_token: float  # of the training split: turns nats per token into bits per byte
    started: float  # Unix time at which the run first started, restarts included
    tracking_uri: str
    mlflow_run_id: str
    line: Any  # handle of the `Line` actor


# ---------------------------------------------------------------------------------------------- the driver


def run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> Manifest:
    """Train to the last step, resuming where an earlier run of the same settings stopped."""
    vocab_size, bytes_per_token = check_inputs(config, inputs)
    facts = open_run(config, inputs, output)
    # Beside the driver: on a worker's node it would die with that node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    line = ray.remote(num_cpus=0)(Line).options(scheduling_strategy=here).remote()
    job = Job(
        config=config,
        shards=inputs["prepare"],
        tokenizer=inputs["tokenizer"],
        output=output,
        vocab_size=vocab_size,
        bytes_per_token=bytes_per_token,
        started=facts["started"],
        tracking_uri=facts["tracking_uri"],
        mlflow_run_id=facts["mlflow_run_id"],
        line=line,
    )
    use_gpu = wants_gpu(config)
    workers = config.train.num_workers
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # Ray's types know no return value
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # here and below: its types are of the older API
            num_workers=tuple(workers) if isinstance(workers, list) else workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(config, use_gpu),
            elastic_resize_monitor_interval_s=5,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="ray",
            storage_path=output.url,
            failure_config=FailureConfig(max_failures=config.train.max_restarts),
            callbacks=[FailureNotes(line)],  # type: ignore[list-item]
            worker_runtime_env=None if use_gpu else {"env_vars": ONE_HEAP},
        ),
    )
    try:
        result = attend(trainer, line)
        manifest = finish(config, inputs, output, job, result)
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        tracking.close_run(job.mlflow_run_id, "KILLED" if stopped else "FAILED")
        raise
    tracking.close_run(job.mlflow_run_id, "FINISHED")
    return manifest


def check_inputs(config: Config, inputs: Mapping[str, Artifact]) -> tuple[int, float]:
    """Return the vocabulary's size and the mean bytes of a token; raises `ValueError` for what cannot be trained."""
    shards = inputs["prepare"].manifest()
    tokenizer = inputs["tokenizer"].manifest()
    assert shards is not None
    assert tokenizer is not None
    context_length, batch_tokens = config.model.context_length, config.train.batch_tokens
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_tokenizer(inputs["tokenizer"].download(Path(folder)))
    counts = shards.counts
    if counts["tokenizer_digest"] != loaded.digest or counts["vocabulary_size"] != loaded.vocab_size:
        raise ValueError(
            f"The shards at {inputs['prepare'].url} were made with another vocabulary"
            f" ({counts['vocabulary_size']} tokens, digest {counts['tokenizer_digest'][:12]}…) than the tokenizer at"
            f" {inputs['tokenizer'].url} ({loaded.vocab_size} tokens, {loaded.digest[:12]}…); prepare them again."
        )
    if batch_tokens % context_length:
        raise ValueError(
            f"train.batch_tokens is {batch_tokens}, not a multiple of model.context_length, {context_length}."
        )
    most_workers = (
        config.train.num_workers[-1] if isinstance(config.train.num_workers, list) else config.train.num_workers
    )
    if batch_tokens // context_length < most_workers:
        raise ValueError(
            f"train.batch_tokens={batch_tokens} is {batch_tokens // context_length} sequences of {context_length},"
            f" too few for {most_workers} workers; raise it, or lower train.num_workers."
        )
    if counts["train"]["tokens"] < batch_tokens + 1:
        raise ValueError(
            f"The corpus is too small: its train split holds {counts['train']['tokens']:,} tokens and one batch takes"
            f" {batch_tokens:,}; add text, or lower train.batch_tokens."
        )
    if counts["val"]["tokens"] < 2 or counts["val"]["bytes"] == 0:
        raise ValueError("The corpus has no held-out text: raise prepare.validation_fraction, or add text.")
    return loaded.vocab_size, counts["train"]["bytes"] / counts["train"]["tokens"]


def open_run(config: Config, inputs: Mapping[str, Artifact], output: Artifact) -> dict[str, Any]:
    """Note the run before it starts, or read the note of the one to resume; refuses to resume with other settings."""
    wanted = settings(config)
    known: dict[str, Any] = {}
    if output.exists(RUN_FILE):
        known = json.loads(output.read_text(RUN_FILE))
        if known["fingerprint"] != output.fingerprint:
            raise ValueError(
                f"The run {output.url} was started with another config:"
                f" {describe_difference(known['settings'], wanted)}"
                " Give this one another name (train.run), or delete that folder."
            )
    try:
        tracking_uri = tracking.connect(config)
        run_id = tracking.open_run(
            config,
            known.get("mlflow_run_id"),
            name=output.url.rpartition("/")[2],
            data={"tokenizer": inputs["tokenizer"], "prepare": inputs["prepare"]},
            facts={"artifact": output.url, "fingerprint": output.fingerprint},
        )
    except ValueError as error:
        if "mlflow_run_id" not in known:
            raise
        print(f"{error} Training goes on, and MLflow gets the rest when it is back.", flush=True)
        return known | {"tracking_uri": tracking.address(config)}
    if run_id != known.get("mlflow_run_id"):
        known = {
            "mlflow_run_id": run_id,
            "fingerprint": output.fingerprint,
            "settings": wanted,
            "started": known.get("started", time.time()),
        }
        output.write_text(RUN_FILE, json.dumps(known, indent=1))
        with Tracker(tracking_uri, run_id) as tracker:
            tracker.log_text("config.yaml", to_yaml(config))
            tracker.flush(timeout_seconds=30)
    return known | {"tracking_uri": tracking_uri}


def wants_gpu(config: Config) -> bool:
    """Decide by the config, or by whether the cluster has a GPU."""
    if config.train.device == "auto":
        return ray.cluster_resources().get("GPU", 0) >= 1
    return config.train.device == "gpu"


def worker_resources(config: Config, use_gpu: bool) -> dict[str, float]:
    """What one worker reserves; a fixed number of CPU workers shares out a cluster that has fewer CPUs than that."""
    cpus = config.train.cpus_per_worker
    workers = config.train.num_workers
    total = ray.cluster_resources().get("CPU", 0.0)
    if not use_gpu and isinstance(workers, int) and 0 < total < cpus * workers:
        cpus = math.floor(100 * total / workers) / 100
    return {"CPU": cpus, "GPU": 1.0} if use_gpu else {"CPU": cpus}


def attend(trainer: TorchTrainer, line: Any) -> dict[str, Any]:
    """Run the trainer, print what the workers say, and turn SIGTERM and Ctrl-C into a checkpoint and a clean stop."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["value"] = trainer.fit().return_value  # type: ignore[attr-defined]
        except BaseException as error:
            outcome["error"] = error

    # Not in the main thread: there `fit` would take over Ctrl-C and abort without a checkpoint.
    fitting = threading.Thread(target=fit, name="trainer", daemon=True)
    with caught_signals() as caught:
        fitting.start()
        asked_at = None
        while fitting.is_alive():
            fitting.join(0.25)
            for words in ray.get(line.listen.remote()):
                print(words, flush=True)
            if caught and asked_at is None:
                print("stopping: writing a checkpoint first", flush=True)
                line.stop.remote()
                asked_at = time.monotonic()
            if len(caught) > 1 or (asked_at is not None and time.monotonic() - asked_at > 25):
                break
        if not fitting.is_alive():
            for words in ray.get(line.listen.remote()):
                print(words, flush=True)
    fatal = ray.get(line.fatal.remote())
    if fatal is not None:
        raise ValueError(fatal)
    if caught:
        if caught[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + caught[0])
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; outside the main thread, do nothing."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {
        number: signal.signal(number, lambda got, _: caught.append(got)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(
    config: Config, inputs: Mapping[str, Artifact], output: Artifact, job: Job, result: dict[str, Any]
) -> Manifest:
    """Put the best checkpoint and the loss plot where the next stages look, close the MLflow run, mark it done."""
    store = CheckpointStore(output, config.train.keep_checkpoints)
    best = store.best()
    assert best is not None, "the last step is always evaluated and kept"
    files: dict[str, FileRecord] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = store.fetch(best, Path(folder) / best)
        for name in EXPORTED:
            files[f"checkpoint/{name}"] = output.write_bytes(f"checkpoint/{name}", (checkpoint / name).read_bytes())
        last = next(name for name, _ in store.whole())
        progress = Progress.load(store.fetch(last, Path(folder) / last))
    picture = progress.draw(config.name)
    files["loss.png"] = output.write_bytes("loss.png", picture)
    files["config.yaml"] = output.write_text("config.yaml", to_yaml(config))
    with Tracker(job.tracking_uri, job.mlflow_run_id, unsent=result["unsent"], resumed=True) as tracker:
        tracker.log_drawing("loss.png", lambda: picture)
        if not tracker.flush(timeout_seconds=60 * config.train.mlflow_patience_minutes):
            output.write_text("unsent.json", json.dumps(tracker.unsent()))
            print(f"MLflow did not answer; what it has not taken lies in {output.url}/unsent.json", flush=True)
    if output.exists("ray"):
        output.filesystem.rm(output.file("ray"), recursive=True)  # Ray Train's own notes; it needs them no more
    return output.commit(
        counts={
            "mlflow_run_id": job.mlflow_run_id,
            "steps": config.train.steps,
            "tokens": progress.tokens,
            "bits_per_byte": progress.best_bits_per_byte,
            "best_step": progress.best_step,
            "num_parameters": result["num_parameters"],
            "restarts": len(progress.restarts),
            "skipped_steps": progress.skipped_steps,
            "seconds": progress.seconds,
        },
        files=files,
    )


# ---------------------------------------------------------------------------------------------- the workers


@dataclass
class Progress:
    """What a checkpoint knows beside weights and optimizer; plain values, `progress.json` in its folder."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    best_step: int = 0
    best_bits_per_byte: float = math.inf
    training: list[list[float]] = field(default_factory=list)  # points of (step, nats per token)
    validation: list[list[float]] = field(default_factory=list)  # points of (step, nats per token, bits per byte)
    seconds: dict[str, float] = field(default_factory=dict)  # wall clock by activity
    saved: float = 0.0  # Unix time
    restarts: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    unsent: list[dict[str, Any]] = field(default_factory=list)  # what MLflow had not taken yet

    @classmethod
    def load(cls, folder: Path) -> "Progress":
        return cls(**json.loads((folder / "progress.json").read_text()))

    def save(self, folder: Path) -> None:
        (folder / "progress.json").write_text(json.dumps(asdict(self)))

    def copy(self) -> "Progress":
        return Progress(**json.loads(json.dumps(asdict(self))))

    def draw(self, name: str) -> bytes:
        return draw_loss(self.training, self.validation, title=f"{name}, step {self.step:,}")

    def note_score(self, score: "Score") -> None:
        """Add an evaluation; all ranks do, since all must know which checkpoint is the best."""
        self.validation.append([self.step, score.nats_per_token, score.bits_per_byte])
        if self.step > 0 and score.bits_per_byte < self.best_bits_per_byte:
            self.best_bits_per_byte, self.best_step = score.bits_per_byte, self.step

    def note_restart(self, workers: int, why: str) -> None:
        """Keep a record of going on from this checkpoint, and of what ended the work before."""
        self.restarts.append({"step": self.step, "workers": workers, "time": round(time.time()), "why": why})


class BadLoss(ArithmeticError):
    """A loss or a gradient that is no number."""

    def __init__(self, step: int, loss: float, gradient_norm: float) -> None:
        super().__init__(f"The loss of step {step} is {loss}, its gradient norm {gradient_norm}")
        self.step = step


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Be one of Ray Train's workers; tells the driver at once of what no restart would mend."""
    job: Job = loop_config["job"]
    try:
        return train_on_one(job)
    except ValueError as error:
        ray.get(job.line.give_up.remote(str(error)))
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            ray.get(job.line.give_up.remote(explain_out_of_memory(job, error)))
        raise


def train_on_one(job: Job) -> dict[str, Any]:
    """Train on one worker from the last checkpoint to the last step; returns what the driver needs to finish."""
    config, options, line = job.config, job.config.train, job.line
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        logging.getLogger("pipeline").addHandler(LineHandler(line))  # warnings reach the person at the driver
    if ray.get(line.fatal.remote()) is not None:
        return {}  # no restart would mend what stopped the workers before these
    device = ray.train.torch.get_device()
    precision = choose_precision(options.precision, device)
    set_threads(options.threads_per_worker, context.get_local_world_size())
    agreement = Agreement(world_size, line if rank == 0 else None)
    store = CheckpointStore(job.output, options.keep_checkpoints)
    scratch = Path(tempfile.mkdtemp(prefix="train-"))

    # data: batch `step` is the same whatever the number of workers, and whatever happened before
    stream = open_stream(job, pin_memory=device.type == "cuda")
    tokenizer = load_tokenizer(job.tokenizer.download(scratch / "tokenizer"))

    # model: as it was in the newest whole checkpoint, or as the seed makes it
    torch.manual_seed(config.seed)
    model = GPT(config.model, tokenizer.vocab_size)
    if rank == 0:
        store.remove_unfinished()
    newest = agreement.from_rank_0(lambda: store.newest(scratch))
    resumed = None if newest is None else store.fetch(newest, scratch / newest)
    if resumed is not None:
        import_weights(model, load_file(resumed / WEIGHTS), str(resumed))
    model.to(device)
    strategy = options.sharding if world_size > 1 else "none"
    module = parallelize(
        model,
        strategy=strategy,
        compile=options.compile,
        precision=precision,
        recompute=options.recompute_activations,
    )

    # optimizer
    optimizer = build_optimizer(model, config.optimizer, options.steps)

    # resume
    progress = Progress()
    if resumed is not None:
        optimizer.load_state_dict(load_training_state(resumed)["optimizer"])
        progress = Progress.load(resumed)
    why = agreement.from_rank_0(lambda: ray.get(line.begin.remote(progress.step)))
    if resumed is not None:
        progress.note_restart(world_size, why)
    clock = TimeSplit(progress.seconds, progress.saved or job.started, "restart" if resumed else "startup")
    report = Report(job, progress, clock, model, world_size, precision) if rank == 0 else None
    writer = BackgroundWriter()

    def evaluate() -> float:
        """Score the val split on all ranks; rank 0 writes samples and reports."""
        with clock.during("evaluation"):
            score = score_validation(job, module if strategy == "fsdp" else LossModule(model), tokenizer, precision)
            progress.note_score(score)
            if report is not None:
                report.evaluated(
                    score, write_samples(config, model, tokenizer, precision) if strategy != "fsdp" else {}
                )
            gc.collect()
        return score.bits_per_byte

    def save(bits_per_byte: float | None) -> None:
        """Copy what a resume needs; it is written while training goes on."""
        if report is None and strategy != "fsdp":
            return  # what is sharded, all ranks gather
        with clock.during("checkpoint"):
            weights, state = export_weights(model), {"optimizer": on_cpu(optimizer.state_dict())}
            if report is not None:
                frozen = report.freeze()
                counts = {"bits_per_byte": bits_per_byte}
                write = partial(write_checkpoint, config, tokenizer, weights, state, frozen)
                writer.start(lambda: store.write(frozen.step, counts, write))

    # loop
    batches = stream.batches(progress.step, rank, world_size)
    unread: tuple[int, StepMeasures] | None = None  # of the last step: read while a GPU is busy with the next
    stopping = False
    try:
        if progress.step == 0:
            evaluate()
        gc.collect()
        gc.disable()  # its pauses would hold up every rank; it runs at each evaluation
        while progress.step < options.steps and not stopping:
            clock.switch("data_wait")
            batch = next(batches)
            clock.switch("compute")
            seed_step(config.seed, progress.step, rank)
            measures = train_step(
                module,
                optimizer,
                batch.split(options.micro_batch_sequences),
                step=progress.step,
                global_tokens=batch.global_tokens,
                precision=precision,
                skip_bad_loss=options.on_bad_loss == "skip",
            )
            read_measures(unread, optimizer, progress, report)
            progress.step += 1
            progress.tokens += batch.global_tokens
            unread = (progress.step, measures)

            # report
            writer.check()
            stopping, saving = agreement.exchange(save=report is not None and report.is_save_due())
            finished = progress.step == options.steps
            evaluating = finished or progress.step % options.evaluate_every_steps == 0
            every = options.checkpoint_every_steps
            saving = saving or stopping or finished or (every > 0 and progress.step % every == 0)
            if evaluating or saving:
                read_measures(unread, optimizer, progress, report)
                unread = None
                bits_per_byte = evaluate() if evaluating else None
                if saving or bits_per_byte == progress.best_bits_per_byte:
                    save(bits_per_byte)
        agreement.close()
        with clock.during("checkpoint"):
            writer.wait()
    except BadLoss as error:
        writer.wait()  # the checkpoint before the bad step may still be on its way
        if report is not None:
            ray.get(line.give_up.remote(report.describe_bad_loss(error, stream.identity(error.step - 1))))
        return {}
    finally:
        gc.enable()
        stream.close()
        shutil.rmtree(scratch, ignore_errors=True)
    return {} if report is None else report.finish()


@dataclass(frozen=True)
class Score:
    """How well the val split is predicted, and how long the weights are as one vector."""

    nats_per_token: float
    bits_per_byte: float
    weight_norm: float


def score_validation(job: Job, module: torch.nn.Module, tokenizer: Tokenizer, precision: torch.dtype) -> Score:
    """Score each rank's part of the val split and add them up; every rank returns the same."""
    options, stream_options = job.config.train, job.config.stream
    device = next(module.parameters()).device
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    byte_lengths = torch.from_numpy(tokenizer.byte_lengths).to(device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes
    batches = ValidationStream(
        job.shards,
        context_length=job.config.model.context_length,
        batch_sequences=options.micro_batch_sequences,
        max_tokens=options.evaluation_tokens,
        cache_folder=stream_options.cache_folder or None,
        cache_gigabytes=stream_options.cache_gigabytes,
        document_boundaries=options.document_boundaries,
    ).batches(rank, world_size)
    module.eval()
    with torch.no_grad(), autocast(device, precision):
        for batch in batches:
            targets = batch.targets.to(device)
            document_ids = None if batch.document_ids is None else batch.document_ids.to(device)
            totals[0] += module(batch.tokens.to(device), targets, document_ids)
            scored = targets[targets >= 0]
            totals[1] += scored.numel()
            totals[2] += byte_lengths[scored].sum()
    module.train()
    if world_size > 1:
        dist.all_reduce(totals)
    nats, tokens, num_bytes = totals.tolist()
    return Score(nats / tokens, bits_per_byte(nats, int(num_bytes)), weight_norm(module))


def write_samples(config: Config, model: GPT, tokenizer: Tokenizer, precision: torch.dtype) -> dict[str, str]:
    """Complete each prompt, always with the same seed, so that evaluations compare."""
    settings = SamplingSettings(max_tokens=config.train.sample_tokens, temperature=0.8, top_k=50, seed=config.seed)
    model.eval()
    device = next(model.parameters()).device
    # Each length of a text would be compiled anew, and thrown away after it.
    with torch.no_grad(), autocast(device, precision), torch.compiler.set_stance("force_eager"):
        samples = {prompt: complete(model, tokenizer, prompt, settings) for prompt in config.train.sample_prompts}
    model.train()
    return samples


def write_checkpoint(
    config: Config,
    tokenizer: Tokenizer,
    weights: dict[str, torch.Tensor],
    state: dict[str, Any],
    progress: Progress,
    folder: Path,
) -> None:
    """Fill a checkpoint's folder: what `transformers` reads, and what a resume needs beside it."""
    write_model(folder, config.model, tokenizer.vocab_size, weights, tokenizer)
    save_training_state(folder, state)
    progress.save(folder)


def read_measures(
    unread: tuple[int, StepMeasures] | None, optimizer: Optimizer, progress: Progress, report: "Report | None"
) -> None:
    """Look at what a step measured, for which the host waits; raises `BadLoss` unless that step was skipped."""
    if unread is None:
        return
    step, measures = unread
    loss, gradient_norm = measures.read()
    if measures.skipped:
        progress.skipped_steps.append(step)
    elif not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise BadLoss(step, loss, gradient_norm)
    if report is not None:
        report.step_done(step, loss, gradient_norm, optimizer.learning_rates(step - 1), measures.skipped)


def open_stream(job: Job, *, pin_memory: bool) -> TokenStream:
    config = job.config
    return TokenStream(
        job.shards,
        context_length=config.model.context_length,
        batch_sequences=config.train.batch_tokens // config.model.context_length,
        seed=config.seed,
        cache_folder=config.stream.cache_folder or None,
        cache_gigabytes=config.stream.cache_gigabytes,
        window_tokens=config.stream.window_tokens,
        document_boundaries=config.train.document_boundaries,
        pin_memory=pin_memory,
    )


def on_cpu(tree: Any) -> Any:
    """Copy nested tensors to the host; a copy even there, since training goes on while it is written."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: on_cpu(value) for key, value in tree.items()}
    return [on_cpu(value) for value in tree] if isinstance(tree, list) else tree


def set_threads(threads: int, workers_here: int) -> None:
    """Share the cores out among the workers of this node; Ray would give each a single thread."""
    torch.set_num_threads(threads or max(1, count_cores() // workers_here))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of the step too, so that a resumed run draws what it would have drawn."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def is_preempted() -> bool:
    """Tell whether Ray has announced that a node of ours goes away (a spot warning, a drain)."""
    # `ray.train.get_preemption_info` is a barrier of all workers, too much for every step; this is its source.
    context = getattr(get_internal_train_context(), "preemption_context", None)
    return getattr(context, "preemption_info", None) is not None


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain_out_of_memory(job: Job, error: RuntimeError) -> str:
    config, options = job.config, job.config.train
    device = ray.train.torch.get_device()
    world_size = ray.train.get_context().get_world_size()
    alone = device.type == "cpu" and world_size == 1
    memory = estimate_memory(
        config.model,
        config.optimizer,
        job.vocab_size,
        micro_batch_sequences=options.micro_batch_sequences,
        activation_bytes=choose_precision(options.precision, device.type).itemsize,
        recompute=options.recompute_activations,
        shards=world_size if options.sharding == "fsdp" else 1,
        shares=count_shares(torch.get_num_threads(), options.micro_batch_sequences) if alone else 1,
        device=device.type,
    )
    if device.type == "cuda":
        device_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        device_bytes = psutil.virtual_memory().total
    advice = advise_out_of_memory(memory, options.micro_batch_sequences, device_bytes)
    return (
        f"Out of memory: {str(error).strip().splitlines()[0][:200].rstrip('.')}. The estimate of `jobs.plan` is"
        f" {memory.total / 1e9:.2f} GB, of which {advice}"
    )


def advise_out_of_memory(memory: Memory, micro_batch_sequences: int, device_bytes: int) -> str:
    """Name the settings that help: the batch's, or the model's where it does not fit whatever the batch."""
    growing = memory.activations + memory.logits
    fixed = memory.total - growing
    if fixed > device_bytes:
        return (
            f"{fixed / 1e9:.2f} GB are weights, gradients and moments, whatever the batch, and there are"
            f" {device_bytes / 1e9:.2f} GB: use more workers with train.sharding=fsdp, or lower model.num_layers,"
            " model.width or model.mlp_width."
        )
    lower = ": lower that first, the result stays the same; then" if micro_batch_sequences > 1 else ":"
    return (
        f"{growing / 1e9:.2f} GB grow with train.micro_batch_sequences, now {micro_batch_sequences}{lower} set"
        " train.recompute_activations=true or train.precision=bfloat16, use more workers with train.sharding=fsdp, or"
        " lower model.context_length."
    )


class Agreement:
    """What all ranks must do alike though only some of them know: stop, save, resume from one checkpoint.

    Every step starts one tiny all-reduce over gloo and reads that of the step before, so nobody waits for it.
    """

    def __init__(self, world_size: int, line: Any) -> None:
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._asked: tuple[torch.Tensor, Any] | None = None
        self._driver_stops = False
        self._preempted = False
        self._closed = threading.Event()
        if line is not None:
            threading.Thread(target=self._listen, args=(line,), name="listen-to-driver", daemon=True).start()

    def from_rank_0(self, find: Callable[[], Any]) -> Any:
        """Return on every rank what `find` returns on rank 0."""
        found = [find() if self._group is None or dist.get_rank() == 0 else None]
        if self._group is not None:
            dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def exchange(self, *, save: bool) -> tuple[bool, bool]:
        """Tell the others whether to stop and to save; returns what all had said one step earlier."""
        preempted = is_preempted()
        save, self._preempted = save or (preempted and not self._preempted), preempted
        wishes = torch.tensor([self._driver_stops, save], dtype=torch.int32)
        earlier, self._asked = self._asked, None
        if self._group is None:
            return bool(wishes[0]), bool(wishes[1])
        self._asked = wishes, dist.all_reduce(wishes, dist.ReduceOp.MAX, self._group, async_op=True)
        if earlier is None:
            return False, False
        earlier[1].wait()
        return bool(earlier[0][0]), bool(earlier[0][1])

    def close(self) -> None:
        self._closed.set()
        if self._asked is not None:
            self._asked[1].wait()

    def _listen(self, line: Any) -> None:
        while not self._closed.wait(0.5):
            try:
                self._driver_stops = ray.get(line.is_stopping.remote())
            except ray.exceptions.RayError:
                return  # the driver is gone, and Ray ends its workers


class Report:
    """What rank 0 tells: MLflow in the background, the driver's screen, and the curves that checkpoints keep."""

    def __init__(
        self, job: Job, progress: Progress, clock: TimeSplit, model: GPT, world_size: int, precision: torch.dtype
    ) -> None:
        self._job, self._options, self._progress, self._clock = job, job.config.train, progress, clock
        self._model, self._world_size = model, world_size
        device = next(model.parameters()).device
        self._peak_flops = world_size * peak_flops(device, precision)
        self._tracker = Tracker(job.tracking_uri, job.mlflow_run_id, unsent=progress.unsent, resumed=True)
        self._gauges = TrainingGauges(job.config.name)
        self._last_save = self._began = time.monotonic()
        self._first_step = progress.step
        self._marked = (progress.tokens, self._training_seconds())
        self._marked_step = progress.step
        words = f"training on {world_size} worker{'s' * (world_size > 1)} ({device.type}, {str(precision)[6:]})"
        if progress.restarts:
            self._tracker.log_text("restarts.json", json.dumps(progress.restarts, indent=1))
            words += f", going on from step {progress.step:,}"
        self._say(words)

    def step_done(self, step: int, loss: float, gradient_norm: float, rates: dict[str, float], skipped: bool) -> None:
        """Note one step; every `log_every_steps` also to MLflow and the screen."""
        if skipped:
            self._say(f"step {step:,}: loss {loss}, gradient norm {gradient_norm}: this batch was skipped")
        if step % self._options.log_every_steps and step != self._options.steps:
            return
        bits = loss / math.log(2) / self._job.bytes_per_token
        tokens_per_second = self._tokens_per_second()
        metrics = {
            "run/restarts": len(self._progress.restarts),
            "run/skipped_steps": len(self._progress.skipped_steps),
            "speed/tokens_per_second": tokens_per_second,
            "speed/mfu": tokens_per_second * self._model.flops_per_token() / self._peak_flops,
            **{f"learning_rate/{group}": rate for group, rate in rates.items()},
            **({} if step == self._options.steps else self._time_metrics()),  # `finish` logs the last ones
            **memory_metrics(),
        }
        if math.isfinite(loss):
            self._progress.training.append([step, loss])
            metrics |= {"train/loss": loss, "train/bits_per_byte": bits, "train/gradient_norm": gradient_norm}
        self._tracker.log_metrics(metrics, step)
        self._gauges.show(metrics, step)
        self._say(
            f"step {step:>{len(str(self._options.steps))}}/{self._options.steps}   loss {loss:.4f}"
            f"   {bits:.3f} bits per byte   {tokens_per_second:,.0f} tokens/s   {self._time_left(step)} left"
        )

    def evaluated(self, score: Score, samples: dict[str, str]) -> None:
        """Note an evaluation; the first of all is of the untrained model."""
        progress = self._progress
        metrics = {
            "validation/loss": score.nats_per_token,
            "validation/bits_per_byte": score.bits_per_byte,
            "weights/norm": score.weight_norm,
        }
        self._tracker.log_metrics(metrics, progress.step)
        self._gauges.show(metrics, progress.step)
        words = f"step {progress.step:,}: {score.bits_per_byte:.4f} bits per byte on held-out text"
        self._say(words + " (the best so far)" * (progress.step == progress.best_step > 0))
        if samples:
            text = "\n\n".join(f"[{prompt}]{continuation}" for prompt, continuation in samples.items())
            self._tracker.log_text(f"samples/step_{progress.step:08d}.txt", text)
            prompt, continuation = next(iter(samples.items()))
            if progress.step > 0:
                self._say("  sample: " + " ".join((prompt + continuation).split())[:100])
        frozen, name = progress.copy(), self._job.config.name
        self._tracker.log_drawing("loss.png", lambda: frozen.draw(name))

    def is_save_due(self) -> bool:
        minutes = self._options.checkpoint_every_minutes
        return minutes > 0 and time.monotonic() - self._last_save > 60 * minutes

    def freeze(self) -> Progress:
        """Return the progress as it is now, for the checkpoint that is about to be written."""
        self._last_save = time.monotonic()
        self._progress.seconds = self._clock.seconds()
        self._progress.saved = time.time()
        self._progress.unsent = self._tracker.unsent()
        return self._progress.copy()

    def describe_bad_loss(self, error: BadLoss, identity: dict[str, Any]) -> str:
        """Save which batch it was and return the sentence for the user."""
        name = f"bad_batch_step_{error.step:08d}.json"
        text = json.dumps(identity, indent=1)
        self._job.output.write_text(name, text)
        self._tracker.log_text(name, text)
        self._tracker.close(timeout_seconds=10)
        return (
            f"{error}; training stopped there. The batch is named in {self._job.output.url}/{name}, and the last"
            " checkpoint is from before it. Lower the learning rate, or set train.on_bad_loss=skip to go on without"
            " such batches."
        )

    def finish(self) -> dict[str, Any]:
        """Return what the driver needs; MLflow, if it is away, is the driver's to wait for, not the GPUs'."""
        self._tracker.log_metrics(self._time_metrics(), self._progress.step)
        return {
            "unsent": self._tracker.close(timeout_seconds=10),
            "num_parameters": self._model.num_parameters(),
            "seconds": self._clock.seconds(),
        }

    def _say(self, words: str) -> None:
        self._job.line.say.remote(words)

    def _training_seconds(self) -> float:
        seconds = self._clock.seconds()
        return seconds["compute"] + seconds["data_wait"]

    def _tokens_per_second(self) -> float:
        """Tokens of the steps since the last call, over the time that training them took."""
        now = (self._progress.tokens, self._training_seconds())
        before, self._marked = self._marked, now
        return (now[0] - before[0]) / max(now[1] - before[1], 1e-9)

    def _time_left(self, step: int) -> str:
        per_step = (time.monotonic() - self._began) / max(step - self._first_step, 1)
        seconds = round(per_step * (self._options.steps - step))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"

    def _time_metrics(self) -> dict[str, float]:
        seconds = self._clock.seconds()
        return {f"time/{name}_seconds": value for name, value in seconds.items()} | {
            "time/wall_clock_seconds": sum(seconds.values()),
            "time/goodput": seconds["compute"] / max(sum(seconds.values()), 1e-9),
        }
