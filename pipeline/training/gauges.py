"""A training's figures for Prometheus, through Ray's metrics: what infra/grafana draws while a run goes on.

MLflow keeps every figure for good; these say how it goes now, beside the cluster's own.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge

# The Tracker's name -> Prometheus' name (Ray puts `ray_` before it) and its meaning.
GAUGES = {
    "train/loss": ("gpt_train_loss", "nats per token of the last logged step"),
    "train/bits_per_byte": ("gpt_train_bits_per_byte", "the same loss, per byte of text"),
    "train/gradient_norm": ("gpt_train_gradient_norm", "length of the gradient before the step"),
    "validation/loss": ("gpt_train_validation_loss", "nats per token on held-out text"),
    "validation/bits_per_byte": ("gpt_train_validation_bits_per_byte", "bits per byte on held-out text"),
    "speed/tokens_per_second": ("gpt_train_tokens_per_second", "tokens of all workers"),
    "speed/mfu": ("gpt_train_mfu", "model FLOPs utilisation, 0 to 1"),
    "time/goodput": ("gpt_train_goodput", "share of the wall clock that trained the model"),
    "memory/worker_gigabytes": ("gpt_train_worker_memory_gigabytes", "resident memory of rank 0"),
    "memory/gpu_peak_gigabytes": ("gpt_train_gpu_memory_gigabytes", "most GPU memory that rank 0 has allocated"),
    "run/restarts": ("gpt_train_restarts", "times the workers were started again"),
    "run/skipped_steps": ("gpt_train_skipped_steps", "batches skipped for a loss that was not finite"),
}
STEP = ("gpt_train_step", "optimizer steps done")
# Where the wall clock went: one gauge, an `activity` each.
TIME = (
    "gpt_train_seconds",
    "wall clock by activity: compute, data_wait, checkpoint, evaluation, tasks, startup, restart",
)


class TrainingGauges:
    """Shows on Prometheus what the Tracker logs to MLflow; rank 0 has one."""

    def __init__(self, pipeline: str) -> None:
        self._tags = {"pipeline": pipeline}
        self._gauges: dict[str, Gauge] = {}

    def show(self, metrics: Mapping[str, float], step: int) -> None:
        """Set the gauges of those figures that have one."""
        self._set(STEP, step)
        for name, value in metrics.items():
            if name in GAUGES:
                self._set(GAUGES[name], value)
            elif name.startswith("time/") and name.endswith("_seconds") and name != "time/wall_clock_seconds":
                self._set(TIME, value, activity=name.removeprefix("time/").removesuffix("_seconds"))

    def _set(self, declared: tuple[str, str], value: float, **tags: str) -> None:
        name, meaning = declared
        if name not in self._gauges:  # a gauge exists from its first value on, so none shows a false zero
            self._gauges[name] = Gauge(name, meaning, tag_keys=(*self._tags, *tags))
        self._gauges[name].set(value, {**self._tags, **tags})
