"""What rank 0 tells of a training: to MLflow, to the driver's screen, and to the curves that checkpoints keep."""

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from model.gpt import GPT
from pipeline.training.gauges import TrainingGauges
from pipeline.training.goodput import TimeSplit, memory_metrics, peak_flops
from pipeline.training.history import History
from pipeline.training.length import Length
from pipeline.training.machine import describe_machine, name_precision
from pipeline.training.plan import TrainingPlan
from pipeline.training.tracker import Tracker
from pipeline.training.validation import Validation


class BadLoss(ArithmeticError):
    """A loss or a gradient that is no number."""

    def __init__(self, step: int, loss: float, gradient_norm: float, skipped_in_a_row: int = 0) -> None:
        words = f"The loss of step {step} is {loss}, its gradient norm {gradient_norm}"
        if skipped_in_a_row:
            words += f", and the {skipped_in_a_row} steps up to it had to be skipped in a row"
        super().__init__(words)
        self.step = step
        self.skipped_in_a_row = skipped_in_a_row


@dataclass(frozen=True)
class Evaluation:
    """How well the val split is predicted, how long the weights are as one vector, and what the model writes."""

    validation: Validation
    weight_norm: float
    forgotten: float | None  # bits per byte that the base's text costs more than at first
    ended: float | None  # share of the answers that ended by themselves
    samples: dict[str, str]  # prompt -> continuation


class Report:
    """What rank 0 tells: MLflow in the background, the driver's screen, and the curves that checkpoints keep."""

    def __init__(
        self,
        plan: TrainingPlan,
        line: Any,
        history: History,
        clock: TimeSplit,
        model: GPT,
        world_size: int,
        precision: torch.dtype,
    ) -> None:
        self._plan, self._line, self._options = plan, line, plan.train
        self._history, self._clock, self._model = history, clock, model
        self._length = Length(plan.train)
        device = next(model.parameters()).device
        self._peak_flops = world_size * peak_flops(device, precision)
        self._tracker = Tracker(plan.tracking_uri, plan.mlflow_run_id, unsent=history.unsent, resumed=True)
        self._gauges = TrainingGauges(plan.name)
        self._last_save = self._began = time.monotonic()
        self._first_step = history.step
        self._marked = (history.tokens, self._training_seconds())
        self._tracker.log_tags(describe_machine(device, precision, world_size))
        words = f"training on {world_size} worker{'s' * (world_size > 1)} ({device.type}, {name_precision(precision)})"
        if history.restarts:
            self._tracker.log_text("restarts.json", json.dumps(history.restarts, indent=1))
            words += f", going on from step {history.step:,}"
        self._say(words)

    def share_passed(self) -> float:
        """Return the share of the training's minutes that has passed; 0 where steps are counted."""
        return self._length.share_passed(self._clock.seconds())

    def step_done(
        self, step: int, loss: float, gradient_norm: float, rates: dict[str, float], *, skipped: bool, last: bool
    ) -> None:
        """Note one step; every `log_every_steps`, and the last one, also to MLflow and the screen."""
        if skipped:
            self._say(f"step {step:,}: loss {loss}, gradient norm {gradient_norm}: this batch was skipped")
        if step % self._options.log_every_steps and not last:
            return
        bits = loss / math.log(2) / self._plan.bytes_per_token
        tokens_per_second = self._tokens_per_second()
        metrics = {
            "run/restarts": len(self._history.restarts),
            "run/skipped_steps": len(self._history.skipped_steps),
            "speed/tokens_per_second": tokens_per_second,
            "speed/mfu": tokens_per_second * self._model.flops_per_token() / self._peak_flops,
            **{f"learning_rate/{group}": rate for group, rate in rates.items()},
            **({} if last else self._time_metrics()),  # `finish` logs the last ones
            **memory_metrics(),
        }
        if math.isfinite(loss):
            self._history.training.append([step, loss])
            metrics |= {"train/loss": loss, "train/bits_per_byte": bits, "train/gradient_norm": gradient_norm}
        self._tracker.log_metrics(metrics, step)
        self._gauges.show(metrics, step)
        figures = f"loss {loss:.4f}   {bits:.3f} bits per byte   {tokens_per_second:,.0f} tokens/s"
        self._line.say_step.remote(step, figures, self._time_left(step))

    def evaluated(self, evaluation: Evaluation) -> None:
        """Note an evaluation; the first of all is of the untrained model."""
        history = self._history
        score, sources = evaluation.validation.score, evaluation.validation.sources
        metrics = {
            "validation/loss": score.nats_per_token,
            "validation/bits_per_byte": score.bits_per_byte,
            "weights/norm": evaluation.weight_norm,
            **{f"validation/{name}/bits_per_byte": each.bits_per_byte for name, each in sources.items()},
        }
        base = evaluation.validation.base
        if base is not None and evaluation.forgotten is not None:
            metrics |= {"base/bits_per_byte": base.bits_per_byte, "base/forgotten": evaluation.forgotten}
        if evaluation.ended is not None:
            metrics["answers/ended"] = evaluation.ended
        self._tracker.log_metrics(metrics, history.step)
        self._gauges.show(metrics, history.step)
        self._line.note_score.remote(history.step, score.bits_per_byte)
        words = f"step {history.step:,}: {score.bits_per_byte:.4f} bits per byte on held-out text"
        if sources:
            words += f" ({', '.join(f'{name} {each.bits_per_byte:.4f}' for name, each in sources.items())})"
        if base is not None:
            words += f"; base text {base.bits_per_byte:.4f} ({evaluation.forgotten:+.4f})"
        if evaluation.ended is not None:
            words += f"; {evaluation.ended:.0%} of the answers end by themselves"
        self._say(words + " (the best so far)" * (history.step == history.best_step > 0))
        if evaluation.samples:
            text = "\n\n".join(f"[{prompt}]{continuation}" for prompt, continuation in evaluation.samples.items())
            self._tracker.log_text(f"samples/step_{history.step:08d}.txt", text)
            prompt, continuation = next(iter(evaluation.samples.items()))
            if history.step > 0:
                self._say("  sample: " + " ".join((prompt + continuation).split())[:100])
        frozen, name = history.copy(), self._plan.name
        self._tracker.log_drawing("loss.png", lambda: frozen.draw(name))

    def examined(self, figures: dict[str, float], lines: list[str]) -> None:
        """Note what tasks came to at this step."""
        self._tracker.log_metrics({f"tasks/{name}": value for name, value in figures.items()}, self._history.step)
        for line in lines:
            self._say(f"step {self._history.step:,}: {line}")

    def is_save_due(self) -> bool:
        minutes = self._options.checkpoint_every_minutes
        return minutes > 0 and time.monotonic() - self._last_save > 60 * minutes

    def freeze(self) -> History:
        """Return the history as it is now, for the checkpoint that is about to be written."""
        self._last_save = time.monotonic()
        self._history.seconds = self._clock.seconds()
        self._history.saved = time.time()
        self._history.unsent = self._tracker.unsent()
        return self._history.copy()

    def describe_bad_loss(self, error: BadLoss, identity: dict[str, Any]) -> str:
        """Save which batch it was and return the sentence for the user."""
        name = f"bad_batch_step_{error.step:08d}.json"
        text = json.dumps(identity, indent=1)
        self._plan.output.write_text(name, text)
        self._tracker.log_text(name, text)
        self._tracker.close(timeout_seconds=10)
        advice = "Lower the learning rate, or set train.on_bad_loss=skip to go on without such batches."
        if error.skipped_in_a_row:
            advice = "Lower the learning rate, or begin anew with another seed."
        return (
            f"{error}; training stopped there. The batch is named in {self._plan.output.url}/{name}, and the last"
            f" checkpoint is from before it. {advice}"
        )

    def finish(self, *, in_haste: bool) -> dict[str, Any]:
        """Return what the driver needs; waiting for an MLflow that is away is left to it, since it holds no GPU."""
        self._tracker.log_metrics(self._time_metrics(), self._history.step)
        return {
            "unsent": self._tracker.close(timeout_seconds=1 if in_haste else 10),
            "num_parameters": self._model.num_parameters(),
            "device": next(self._model.parameters()).device.type,
            "seconds": self._clock.seconds(),
        }

    def _say(self, words: str) -> None:
        self._line.say.remote(words)

    def _training_seconds(self) -> float:
        seconds = self._clock.seconds()
        return seconds["compute"] + seconds["data_wait"]

    def _tokens_per_second(self) -> float:
        """Tokens of the steps since the last call, over the time that training them took."""
        now = (self._history.tokens, self._training_seconds())
        before, self._marked = self._marked, now
        return (now[0] - before[0]) / max(now[1] - before[1], 1e-9)

    def _time_left(self, step: int) -> str:
        if self._length.is_timed:
            seconds = round(self._length.seconds_left(self._clock.seconds()))
        else:
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
