"""The loop that every worker of a training runs, top to bottom: data, model, optimizer, resume, loop, report.

Which tokens a step sees and which randomness it uses are functions of (seed, step) alone, so a training that was
killed anywhere goes on from its last checkpoint as if it had never stopped.
"""

import gc
import hashlib
import logging
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from model.chat import open_template, save_template
from model.checkpoint import (
    WEIGHTS,
    crop_positions,
    export_weights,
    import_weights,
    load_training_state,
    read_weights,
    save_training_state,
    write_model,
)
from model.gpt import GPT
from model.gpu_steps import use_flash_attention
from model.lora import ADAPTER_FOLDER, adapt, export_adapter, import_adapter, load_adapter, merge, save_adapter
from model.optimizer import Optimizer, build_optimizer
from model.tokenizer import Tokenizer, load_tokenizer
from model.training import (
    GraphedLoss,
    LossModule,
    StepMeasures,
    choose_precision,
    compile_ahead,
    parallelize,
    scores_as_trained,
    train_step,
)
from pipeline.corpus import mixing
from pipeline.corpus.stream import BatchStream
from pipeline.training.agreement import Agreement
from pipeline.training.checkpoints import BackgroundWriter, CheckpointStore
from pipeline.training.failures import explain_lasting_failure
from pipeline.training.goodput import TimeSplit, weight_norm
from pipeline.training.history import History
from pipeline.training.length import Length
from pipeline.training.line import LineHandler
from pipeline.training.machine import name_precision
from pipeline.training.plan import TrainingPlan
from pipeline.training.report import BadLoss, Evaluation, Report
from pipeline.training.resources import find_missing_for_compile, set_compile_threads, set_threads
from pipeline.training.samples import share_that_ends, write_samples
from pipeline.training.scratch import make_scratch, remove_abandoned
from pipeline.training.start import fetch_start, keep_companions
from pipeline.training.validation import HeldOut, find_questions, open_validation, score_held_out

logger = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 20  # a batch can be bad; so many of them are weights that no batch brings back


def train_worker(told: dict[str, Any]) -> dict[str, Any]:
    """Be one of Ray Train's workers; tells the driver at once of what no restart would mend."""
    plan: TrainingPlan = told["plan"]
    line = told["line"]
    try:
        return train_on_one(plan, line)
    except Exception as error:
        world_size, device = ray.train.get_context().get_world_size(), ray.train.torch.get_device()
        sentence = explain_lasting_failure(error, plan, device, world_size)
        if sentence is not None:
            ray.get(line.give_up.remote(sentence))
        raise


def train_on_one(plan: TrainingPlan, line: Any) -> dict[str, Any]:
    """Train on one worker from the last checkpoint to the last step; returns what the driver needs to finish.

    `line` is the handle of a `Line` actor.
    """
    options = plan.train
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        logging.getLogger("pipeline").addHandler(LineHandler(line))  # warnings reach the person at the driver
    if ray.get(line.fatal.remote()) is not None:
        return {}  # no restart would mend what stopped the workers before these
    device = ray.train.torch.get_device()
    set_threads(options.threads_per_worker, context.get_local_world_size())
    missing = find_missing_for_compile(device) if options.compile else ""
    if missing:
        logger.warning("train.compile=true needs %s; without it the same is learnt, more slowly.", missing)
    compiles = options.compile and not missing
    agreement = Agreement(world_size, line if rank == 0 else None)
    store = CheckpointStore(plan.output, options.keep_checkpoints)
    remove_abandoned(plan.output.fingerprint)
    scratch = make_scratch(plan.output.fingerprint, "worker")

    # data: batch `step` is the same whatever the number of workers, and whatever happened before
    stream = open_stream(plan, pin_memory=device.type == "cuda")
    tokenizer = load_tokenizer(plan.tokenizer.download(scratch / "tokenizer"))
    template = open_template(plan.chat_template, tokenizer.template_names) if plan.chat_template else None

    # model: as it was in the newest whole checkpoint, or in the start, or random
    torch.manual_seed(plan.seed)
    model = GPT(plan.model, plan.vocab_size)
    model.restarts_positions = bool(plan.chat_template)  # a conversation is learnt as it will be served: alone
    if rank == 0:
        store.remove_unfinished()
    newest = agreement.from_rank_0(lambda: store.newest(scratch))
    resumed = None if newest is None else store.fetch(newest, scratch / newest)
    history = History() if resumed is None else History.load(resumed)
    start = None
    lora = options.lora
    if plan.start is not None:
        start = fetch_start(plan.start, scratch / "start", weights=resumed is None or lora is not None)
    if resumed is not None and lora is None:
        import_weights(model, load_file(resumed / WEIGHTS), str(resumed))
    elif start is not None:
        import_weights(model, crop_positions(read_weights(start), plan.model), str(start))
    if lora is not None:
        adapt(model, lora)  # a checkpoint's weights are merged, so it goes on from the start's and the factors
        if resumed is not None:
            import_adapter(model, load_adapter(resumed / ADAPTER_FOLDER), str(resumed))
    model.to(device)
    history.precision = agreement.from_rank_0(lambda: keep_precision(history.precision, options.precision, device))
    precision = getattr(torch, history.precision)
    strategy = options.sharding if world_size > 1 else "none"
    if device.type == "cuda":
        use_flash_attention(options.flash_attention)
    module = parallelize(
        model,
        strategy=strategy,
        compile=compiles,
        precision=precision,
        gradient_precision=getattr(torch, options.gradient_precision),
        recompute=options.recompute_activations,
        graphs=options.cuda_graphs,
        pointwise=options.pointwise if device.type == "cuda" else "torch",
    )
    sequences = options.batch_tokens // plan.model.context_length
    if compiles:
        compile_in_turns(module, plan, math.ceil(sequences / world_size), precision, agreement)

    # optimizer
    length = Length(options)
    optimizer = build_optimizer(model, plan.optimizer, options.steps, precision)

    # resume
    if resumed is not None:
        optimizer.load_state_dict(load_training_state(resumed)["optimizer"])
    why = agreement.from_rank_0(lambda: ray.get(line.begin.remote(history.step)))
    if resumed is not None:
        history.note_restart(world_size, why)
    clock = TimeSplit(history.seconds, history.saved or plan.started, "restart" if resumed else "startup")
    report = Report(plan, line, history, clock, model, world_size, precision) if rank == 0 else None
    writer = BackgroundWriter()
    # Where minutes count, all ranks and the learning rates go by rank 0's clock.
    share_passed = agreement.from_rank_0(lambda: length.share_passed(clock.seconds()))

    def evaluate() -> float:
        """Score the val split on all ranks; rank 0 writes samples and reports."""
        with clock.during("evaluation"):
            scored = module if strategy == "fsdp" else LossModule(model)
            held_out = open_held_out(plan)
            validation = score_held_out(
                scored,
                held_out,
                tokenizer.byte_lengths,
                precision=precision,
                rank=rank,
                world_size=world_size,
                as_trained=compiles and scores_as_trained(module, plan.model),
            )
            if isinstance(module, FSDPModule):
                module.reshard()  # after a pass without gradients the outermost weights stay gathered
            score, base = validation.score, validation.base
            history.note_score(score.nats_per_token, score.bits_per_byte)
            forgotten = None if base is None else history.note_base(base.bits_per_byte)
            norm = weight_norm(model)
            if report is not None:
                # What is sharded, one rank alone cannot ask for an answer.
                samples, ended = ({}, None) if strategy == "fsdp" else ask_model(held_out)
                report.evaluated(Evaluation(validation, norm, forgotten, ended, samples))
            gc.collect()
        return score.bits_per_byte

    def examine() -> None:
        """Ask the tasks' items, shared out over the ranks; no step's randomness and no weight is touched."""
        if plan.exam is not None:
            with clock.during("tasks"):
                figures, lines = plan.exam.ask(model, tokenizer, precision, rank, world_size)
                if report is not None:
                    report.examined(figures, lines)

    def ask_model(held_out: list[HeldOut]) -> tuple[dict[str, str], float | None]:
        """Return the samples, and the share of held-out questions whose answer ends by itself; None without any."""
        samples = write_samples(
            model, tokenizer, options.sample_prompts, options.sample_tokens, plan.seed, precision, template
        )
        questions = find_questions(held_out, options.answer_questions, options.answer_tokens)
        if not questions:
            return samples, None
        return samples, share_that_ends(model, tokenizer, questions, options.answer_tokens, plan.seed, precision)

    def save(bits_per_byte: float | None) -> None:
        """Copy what a resume needs; it is written while training goes on."""
        if report is None and strategy != "fsdp":
            return  # what is sharded, all ranks gather
        with clock.during("checkpoint"):
            weights, state = export_weights(model), {"optimizer": optimizer.state_dict()}
            adapter = export_adapter(model)
            if report is not None:
                frozen = report.freeze()
                counts = {"bits_per_byte": bits_per_byte}
                write = partial(write_checkpoint, plan, tokenizer, start, weights, adapter, state, frozen)
                wish = agreement.save_wish

                def write_and_tell() -> None:
                    store.write(frozen.step, counts, write)
                    line.note_saved.remote(wish)

                writer.start(write_and_tell)

    # loop
    largest_share = math.ceil(sequences / world_size) if strategy == "fsdp" else 0
    batches = stream.batches(history.step, rank, world_size)
    unread: tuple[int, StepMeasures] | None = None  # of the last step: read while a GPU is busy with the next
    stopping = False
    try:
        if history.step == 0:
            evaluate()
            examine()
        gc.collect()
        gc.disable()  # its pauses would hold up every rank; it runs at each evaluation
        while not (stopping or length.is_over(history.step, share_passed)):
            optimizer.total_steps = length.count_steps(history.step, share_passed)
            clock.switch("data_wait")
            batch = next(batches)
            clock.switch("compute")
            seed_step(plan.seed, history.step, rank)
            measures = train_step(
                module,
                optimizer,
                batch.split(options.micro_batch_sequences, largest_share),
                step=history.step,
                global_tokens=batch.global_tokens,
                precision=precision,
                skip_bad_loss=options.on_bad_loss == "skip",
            )
            read_measures(unread, optimizer, history, report)
            history.step += 1
            history.tokens += batch.global_tokens
            unread = (history.step, measures)

            # report
            writer.check()
            stopping, saving, agreed = agreement.exchange(
                save=report is not None and report.is_save_due(),
                share_passed=0.0 if report is None else report.share_passed(),
            )
            share_passed = agreed or share_passed
            finished = length.is_over(history.step, share_passed)
            evaluating = finished or history.step % options.evaluate_every_steps == 0
            every = options.evaluate_tasks_every_steps or options.evaluate_every_steps
            examining = plan.exam is not None and (finished or history.step % every == 0)
            every = options.checkpoint_every_steps
            saving = saving or stopping or finished or (every > 0 and history.step % every == 0)
            if evaluating or examining or saving:
                read_measures(unread, optimizer, history, report, last=finished)
                unread = None
                bits_per_byte = evaluate() if evaluating else None
                if examining:
                    examine()
                if saving or bits_per_byte == history.best_bits_per_byte:
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
    if report is None:
        return {}
    result = report.finish(in_haste=stopping)
    if stopping:
        ray.get(line.note_stopped.remote())
    return result


def keep_precision(before: str, setting: str, device: torch.device) -> str:
    """Return the precision in which the training began; a new one gets what the setting means on this machine."""
    here = name_precision(choose_precision(setting, device))
    if before and before != here:
        logger.warning(
            "This training began in %s and goes on in it; with train.precision=%s this machine alone would take %s.",
            before,
            setting,
            here,
        )
    return before or here


def compile_in_turns(
    module: torch.nn.Module, plan: TrainingPlan, share: int, precision: torch.dtype, agreement: Agreement
) -> None:
    """Compile on one rank of each node with all of its cores; the others then find the code in the node's cache.

    All at once would compile everything as often as a node has ranks. FSDP's ranks cannot run a block alone.
    """
    context = ray.train.get_context()
    workers_here, is_first = context.get_local_world_size(), context.get_local_rank() == 0
    if not isinstance(module, DistributedDataParallel | GraphedLoss):
        set_compile_threads(workers_here)
        return
    set_compile_threads(1 if is_first else workers_here)
    rows, documents = min(share, plan.train.micro_batch_sequences), plan.train.document_boundaries
    has_documents = documents or bool(plan.chat_template)
    compile_mine = partial(compile_ahead, module, rows, plan.model.context_length, precision, documents=has_documents)
    if is_first:
        compile_mine()
        set_compile_threads(workers_here)
    agreement.wait_for_all()
    if not is_first:
        compile_mine()


def open_held_out(plan: TrainingPlan) -> list[HeldOut]:
    return open_validation(
        plan.shards,
        plan.model,
        plan.train,
        plan.stream,
        batch_sequences=plan.train.micro_batch_sequences,
        max_tokens=plan.train.evaluation_tokens,
    )


def write_checkpoint(
    plan: TrainingPlan,
    tokenizer: Tokenizer,
    start: Path | None,
    weights: dict[str, torch.Tensor],
    adapter: dict[str, torch.Tensor],
    state: dict[str, Any],
    history: History,
    folder: Path,
) -> None:
    """Fill a checkpoint's folder: what `transformers` reads, and what a resume needs beside it.

    An adapter is merged into the weights, and lies beside them as `peft` reads it.
    """
    if plan.train.lora is not None:
        merge(weights, adapter, plan.train.lora, plan.model)
        save_adapter(folder / ADAPTER_FOLDER, adapter, plan.train.lora, plan.model, plan.base)
    write_model(folder, plan.model, plan.vocab_size, weights, tokenizer)
    if start is not None:
        keep_companions(start, folder, plan.model.context_length)
    if plan.chat_template:
        save_template(folder, plan.chat_template)
    save_training_state(folder, state)
    history.save(folder)


def read_measures(
    unread: tuple[int, StepMeasures] | None,
    optimizer: Optimizer,
    history: History,
    report: Report | None,
    *,
    last: bool = False,
) -> None:
    """Look at what a step measured, for which the host waits.

    Raises `BadLoss` unless that step was skipped, and where as many as `MOST_SKIPPED_IN_A_ROW` were.
    """
    if unread is None:
        return
    step, measures = unread
    loss, gradient_norm = measures.read()
    if measures.skipped:
        history.skipped_steps.append(step)
        if history.skipped_in_a_row() >= MOST_SKIPPED_IN_A_ROW:
            raise BadLoss(step, loss, gradient_norm, history.skipped_in_a_row())
    elif not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        raise BadLoss(step, loss, gradient_norm)
    if report is not None:
        rates = optimizer.learning_rates(step - 1)
        report.step_done(step, loss, gradient_norm, rates, skipped=measures.skipped, last=last)


def open_stream(plan: TrainingPlan, *, pin_memory: bool) -> BatchStream:
    return mixing.open_stream(
        plan.shards,
        context_length=plan.model.context_length,
        batch_sequences=plan.train.batch_tokens // plan.model.context_length,
        seed=plan.seed,
        cache_folder=plan.stream.cache_folder or None,
        cache_gigabytes=plan.stream.cache_gigabytes,
        window_tokens=plan.stream.window_tokens,
        document_boundaries=plan.train.document_boundaries,
        pin_memory=pin_memory,
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of the step too, so that a resumed run draws what it would have drawn."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
