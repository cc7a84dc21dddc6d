"""The driver's side of a training: starts Ray Train's workers, shows what they say, passes on the wish to stop."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from model.training import CPU_ENVIRONMENT
from pipeline.training.line import FailureNotes, Line
from pipeline.training.plan import TrainingPlan
from pipeline.training.resize import SaveBeforeResize
from pipeline.training.resources import wants_gpu, worker_resources
from pipeline.training.screen import Screen
from pipeline.training.signals import caught_signals
from pipeline.training.worker import train_worker

# A scheduler gives thirty seconds between SIGTERM and SIGKILL; MLflow and Ray's own end take some of the rest.
CHECKPOINT_SECONDS = 20.0
# Seconds between looks at whether there is room for more workers. All of them start anew for each that is added, which
# on GPUs is a minute with compiling: spot nodes trickle in, and should be taken together.
RESIZE_SECONDS = {"cpu": 5.0, "cuda": 120.0}

SILENT_SECONDS = 60.0  # of waiting for workers between two lines that say so


def launch(plan: TrainingPlan, watch: Callable[[TrainingPlan, Any], None] | None = None) -> dict[str, Any]:
    """Train to the last step, restarts included; returns what rank 0 returned.

    `watch` is told the plan and the handle of the `Line` before the workers start: it may read `scores`, and `stop`.

    Raises `ValueError` with one sentence for what no restart would mend, and `SystemExit` or `KeyboardInterrupt`
    after a signal, once a checkpoint is written.
    """
    # Beside the driver: on a worker's node it would die with that node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    line = ray.remote(num_cpus=0)(Line).options(scheduling_strategy=here).remote()
    if watch is not None:
        watch(plan, line)
    options = plan.train
    use_gpu = wants_gpu(options)
    fewest, most = options.fewest_workers, options.most_workers
    trainer = TorchTrainer(
        train_worker,  # type: ignore[arg-type]  # Ray's types know no return value
        train_loop_config={"plan": plan, "line": line},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # here and below: its types are of the older API
            num_workers=fewest if fewest == most else (fewest, most),  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(options, use_gpu),
            elastic_resize_monitor_interval_s=options.resize_seconds or RESIZE_SECONDS["cuda" if use_gpu else "cpu"],
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name="ray",
            storage_path=plan.output.url,
            failure_config=FailureConfig(max_failures=options.max_restarts),
            callbacks=[FailureNotes(line), SaveBeforeResize(line)],  # type: ignore[list-item]
            worker_runtime_env=None if use_gpu else {"env_vars": CPU_ENVIRONMENT},
        ),
    )
    with Screen(None if options.minutes else options.steps) as screen:
        return attend(trainer, line, screen)


def attend(trainer: TorchTrainer, line: Any, screen: Screen) -> dict[str, Any]:
    """Run the trainer, show what the workers say, and turn SIGTERM and Ctrl-C into a checkpoint and a clean stop."""
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["value"] = trainer.fit().return_value  # type: ignore[attr-defined]
        except BaseException as error:
            outcome["error"] = error

    def show_news() -> bool:
        said = ray.get(line.listen.remote())
        for news in said:
            if news.step:
                screen.show_step(news.step, news.words, news.left)
            else:
                screen.say(news.words)
        return bool(said)

    # Not in the main thread: there `fit` would take over Ctrl-C and abort without a checkpoint.
    fitting = threading.Thread(target=fit, name="trainer", daemon=True)
    with caught_signals() as caught:
        fitting.start()
        asked_at = None
        began, waits_told, are_there = time.monotonic(), 0, False
        while fitting.is_alive():
            fitting.join(0.25)
            are_there = show_news() or are_there
            if not are_there and time.monotonic() - began > (waits_told + 1) * SILENT_SECONDS:
                waits_told += 1
                free = ray.available_resources()
                screen.say(
                    f"still waiting for the workers, after {time.monotonic() - began:.0f} s: free on the cluster are"
                    f" {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU"
                )
            if caught and asked_at is None:
                screen.say("stopping: writing a checkpoint first")
                line.stop.remote()
                asked_at = time.monotonic()
            if len(caught) > 1 or (caught and ray.get(line.has_stopped.remote())):
                break
            if asked_at is not None and time.monotonic() - asked_at > CHECKPOINT_SECONDS:
                screen.say(
                    f"stopping without it: it was not written in {CHECKPOINT_SECONDS:.0f} s; the same command goes on"
                    " from the checkpoint before it"
                )
                break
        if not fitting.is_alive():
            show_news()
    fatal = ray.get(line.fatal.remote())
    if fatal is not None:
        raise ValueError(fatal)
    if caught:
        if caught[0] == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + caught[0])
    if "error" in outcome:
        raise outcome["error"]
    if ray.get(line.has_stopped.remote()):
        raise SystemExit("stopped by whoever watches it")
    return outcome["value"]
