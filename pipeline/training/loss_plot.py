"""The picture of a training: its loss on the training data in red, on held-out text in blue."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

Curve = Sequence[Sequence[float]]  # points that begin with (step, nats per token)


def draw_loss(training: Curve, validation: Curve, base: Curve = (), *, title: str) -> bytes:
    """Return a PNG; a validation point goes on with bits per byte, which the axis on the right reads.

    `base` holds points of (step, bits per byte) of the text that a fine-tuning may forget.

    The two scales differ by a factor that is exact for the held-out text and nearly so for the training text.
    """
    # Slow to import, and of many workers one needs it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    marker = "o" if len(validation) <= 60 else ""
    name = f"validation ({validation[-1][2]:.3f} bits per byte)" if validation else "validation"
    axes.plot(*_columns(training), color="red", linewidth=1.0, alpha=0.8, label="training")
    axes.plot(*_columns(validation), color="blue", linewidth=1.8, label=name, marker=marker, markersize=3.5)
    axes.set(xlabel="step (optimizer updates)", ylabel="loss (nats per token)", title=title)
    axes.set_ylim(*_limits(training, validation))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    if validation:
        to_bits = validation[-1][2] / validation[-1][1]
        right = axes.secondary_yaxis("right", functions=(_times(to_bits), _times(1 / to_bits)))
        right.set_ylabel("bits per byte")
        if base:
            steps, bits = _columns(base)
            label = f"base text ({bits[-1]:.3f} bits per byte)"
            axes.plot(steps, [each / to_bits for each in bits], color="green", linestyle="--", label=label)
            axes.legend(loc="upper right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: value * factor


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [point[0] for point in curve], [point[1] for point in curve]


def _limits(*curves: Curve) -> tuple[float, float]:
    """Leave a spike out of the picture rather than press everything else flat."""
    losses = sorted(point[1] for curve in curves for point in curve if math.isfinite(point[1]))
    if not losses:
        return 0.0, 1.0
    low, high = losses[0], losses[min(len(losses) - 1, int(0.995 * len(losses)))]
    margin = 0.05 * max(high - low, 0.1)
    return low - margin, high + margin
