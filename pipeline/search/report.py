"""What a person sees of a search: a page, a table, three pictures, and the preset that it recommends."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from pipeline.config import Config, with_settings
from pipeline.presets import YamlWriter
from pipeline.search.space import Point, describe_point, target_tokens
from pipeline.search.trial import DONE, Record, Trial
from pipeline.search.verdict import Scaling

if TYPE_CHECKING:
    from pipeline.search.study import Final, Findings

NO_DIFFERENCE = "no difference"


def write(config: Config, findings: "Findings", fingerprint: str) -> dict[str, bytes]:
    """Return the search's files by their names."""
    files = {
        "search.md": write_page(config, findings),
        "best.yaml": write_preset(config, findings, fingerprint),
    }
    pictures = {}
    if findings.trials:
        files["trials.csv"] = write_table(findings.trials, findings.records)
        pictures = {
            "parallel.png": draw_parallel(findings.trials, findings.records),
            "curves.png": draw_curves(findings.trials, findings.records),
        }
    if findings.scaling is not None:
        pictures["scaling.png"] = draw_scaling(findings)
    return {name: text.encode() for name, text in files.items()} | pictures


def name_figures(findings: "Findings") -> dict[str, float]:
    """Name what MLflow shows in its columns."""
    figures: dict[str, float] = {}
    done = [record.bits_per_byte for record in findings.records if record.state == DONE]
    if done:
        figures |= {"search/best_trial_bits_per_byte": min(done)}
        figures |= {"search/tokens": float(sum(record.tokens for record in findings.records))}
    verdicts = [final.verdict for final in findings.finals if final.verdict is not None]
    if verdicts:
        best = max(verdicts, key=lambda verdict: verdict.gain)
        figures |= {"search/gain": best.gain, "search/gain_low": best.low, "search/gain_high": best.high}
    if findings.scaling is not None:
        figures["search/predicted_bits_per_byte"] = findings.scaling.predict(findings.target_flops)[0]
    if findings.target_bits is not None:
        figures["search/preset_bits_per_byte"] = findings.target_bits
    return figures


# The page -----------------------------------------------------------------------------------------------------------


def write_page(config: Config, findings: "Findings") -> str:
    """Return the page as Markdown: the answer first, then what it stands on."""
    lines = [f"# Search: {config.name}", "", conclude(findings), ""]
    if findings.finals:
        lines += ["## With fresh seeds", "", "| setting | bits per byte of each seed | mean | gain over the preset |"]
        lines += ["|---|---|---|---|"]
        for final in findings.finals:
            each = ", ".join(f"{bits:.4f}" for bits in final.bits)
            gain = "" if final.verdict is None else str(final.verdict)
            lines.append(f"| {describe_point(final.point)} | {each} | {np.mean(final.bits):.4f} | {gain} |")
        lines += ["", f"Each with {target_tokens(config):,} tokens. {describe_seeds(findings)}", ""]
    if findings.trials:
        lines += ["## Trials", "", "| trial | setting | bits per byte | tokens | |", "|---|---|---|---|---|"]
        lines += [
            f"| {trial.number} | {describe_point(trial.point)} | {_figure(record)} | {record.tokens:,} |"
            f" {record.state}{f': {record.reason}' if record.reason else ''} |"
            for trial, record in ranked(findings.trials, findings.records)
        ]
        lines += ["", f"{sum(record.tokens for record in findings.records):,} tokens together.", ""]
    if findings.scaling is not None:
        lines += ["## What compute says", "", "| width | parameters | FLOPs | bits per byte |", "|---|---|---|---|"]
        lines += [
            f"| {rung.width} | {rung.parameters:,} | {rung.flops:.2e} | {bits:.4f} |" for rung, bits in findings.rungs
        ]
        lines += ["", describe_prediction(findings.scaling, findings), ""]
    return "\n".join(lines)


def conclude(findings: "Findings") -> str:
    """Say what the search found, in a sentence or two."""
    if not findings.finals:
        if not findings.trials:
            return "Only the ladder was asked for."
        (trial, record), *_ = ranked(findings.trials, findings.records)
        return (
            f"The best trial was {describe_point(trial.point)} ({_figure(record)} bits per byte). It was chosen among"
            f" {len(findings.trials)}, and nothing is shown of it: search.seeds is 0."
        )
    winner = findings.winner
    others = [final for final in findings.finals if final.verdict is not None]
    if winner is not None:
        return f"{describe_point(winner.point)} is better than the preset: {winner.verdict}."
    if not others:
        return f"Result: {NO_DIFFERENCE}. No point was as good as the preset in the trials."
    told = "; ".join(f"{describe_point(final.point)}: {final.verdict}" for final in others)
    return f"Result: {NO_DIFFERENCE} from the preset is shown. {told}."


def describe_seeds(findings: "Findings") -> str:
    deviations = [final.verdict.seed_deviation for final in findings.finals if final.verdict is not None]
    bits = findings.finals[0].bits
    deviation = max(deviations, default=float(np.std(bits, ddof=1)) if len(bits) > 1 else 0.0)
    return f"Trainings that differ in their seed alone differ by {deviation:.4f} (standard deviation)."


def describe_prediction(scaling: Scaling, findings: "Findings") -> str:
    """Say what the preset was predicted to reach, and what it really reached."""
    middle, low, high = scaling.predict(findings.target_flops)
    doubt = f" (95 % interval {low:.4f} to {high:.4f})" if math.isfinite(high) else ""
    words = (
        f"bits per byte = {scaling.scale:.3g} x FLOPs^-{scaling.exponent:.4f}. At the preset's"
        f" {findings.target_flops:.2e} FLOPs that predicts {middle:.4f}{doubt}"
    )
    if findings.target_bits is None:
        return f"{words}."
    miss = findings.target_bits - middle
    return f"{words}; it really reached {findings.target_bits:.4f}, {abs(miss):.4f} {'more' if miss > 0 else 'less'}."


def place_of(record: Record) -> tuple[bool, int, float]:
    """Order the table: what came to its end by its figure, what was stopped by how far it came."""
    is_done = record.state == DONE  # with a larger batch a few tokens less
    return (not is_done, 0 if is_done else -record.tokens, record.bits_per_byte)


def ranked(trials: Sequence[Trial], records: Sequence[Record]) -> list[tuple[Trial, Record]]:
    """Trials that came to their end first, the best of them at the top."""
    pairs = list(zip(trials, records, strict=True))
    return sorted(pairs, key=lambda pair: place_of(pair[1]))


def _figure(record: Record) -> str:
    return f"{record.bits_per_byte:.4f}" if math.isfinite(record.bits_per_byte) else ""


def write_table(trials: Sequence[Trial], records: Sequence[Record]) -> str:
    """Return a row for each trial, with its settings as columns."""
    keys = sorted({key for trial in trials for key in trial.point})
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["trial", *keys, "bits_per_byte", "tokens", "state", "seconds", "training", "mlflow_run_id"])
    for trial, record in ranked(trials, records):
        values = [str(value_of(trial, key)) for key in keys]
        row = [_figure(record), record.tokens, record.state, f"{record.seconds:.1f}", trial.output.fingerprint]
        writer.writerow([trial.number, *values, *row, record.mlflow_run_id])
    return sink.getvalue()


def value_of(trial: Trial, key: str) -> Any:
    """The value of a setting in a trial, the preset's where its point does not name it."""
    section, _, name = key.rpartition(".")
    return getattr(getattr(trial.config, section), name)


# The preset ---------------------------------------------------------------------------------------------------------


def write_preset(config: Config, findings: "Findings", fingerprint: str) -> str:
    """Return what the search recommends as a preset, its evidence in comments; the preset itself where nothing won."""
    winner = findings.winner
    point: Point = {} if winner is None else winner.point
    chosen = with_settings(config, point)
    head = [f"Search {fingerprint} of {config.name}.", *conclude(findings).splitlines()]
    head += [f"{describe_final(final)}" for final in findings.finals]
    if findings.finals:
        head.append(describe_seeds(findings))
    if winner is not None:
        head.append(f"Changed: {describe_point(point)}. Tokens as in the preset: {target_tokens(config):,}.")
        train = dataclasses.replace(
            chosen.train, steps=max(1, round(target_tokens(config) / chosen.train.batch_tokens))
        )
        chosen = dataclasses.replace(chosen, train=train)
    comments = "".join(f"# {line}\n" for line in head)
    return comments + yaml.dump(without_defaults(chosen), Dumper=YamlWriter, sort_keys=False, allow_unicode=True)


def describe_final(final: "Final") -> str:
    each = ", ".join(f"{bits:.4f}" for bits in final.bits)
    against = "" if final.verdict is None else f"; gain {final.verdict}"
    return f"{describe_point(final.point)}: {each} bits per byte{against}"


def without_defaults(config: Config) -> dict[str, Any]:
    """What a preset has to say of a config; the storage root and the search itself belong to the command."""
    said: dict[str, Any] = {"name": config.name}
    defaults = Config()
    for leaf in dataclasses.fields(Config):
        value, usual = getattr(config, leaf.name), getattr(defaults, leaf.name)
        if leaf.name in ("name", "storage", "search") or value == usual:
            continue
        if dataclasses.is_dataclass(value):
            pairs = ((each.name, getattr(value, each.name)) for each in dataclasses.fields(value))
            said[leaf.name] = {name: given for name, given in pairs if given != getattr(usual, name)}
        else:
            said[leaf.name] = value
    return said


# The pictures -------------------------------------------------------------------------------------------------------


def _save(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def draw_parallel(trials: Sequence[Trial], records: Sequence[Record]) -> bytes:
    """Draw each trial as a line over its settings to its bits per byte, the best darkest; returns a PNG.

    Axes of numbers are logarithmic where they span a tenfold; what is no number stands in its order.
    """
    from matplotlib import colormaps  # slow to import
    from matplotlib.figure import Figure

    pairs = [(t, r) for t, r in zip(trials, records, strict=True) if math.isfinite(r.bits_per_byte)]
    keys = sorted({key for trial in trials for key in trial.point})
    axes_of = [[value_of(trial, key) for trial, _ in pairs] for key in keys] + [[r.bits_per_byte for _, r in pairs]]
    names = [*(key.rpartition(".")[2] for key in keys), "bits per byte"]
    figure = Figure(figsize=(2.2 * len(names) + 1, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    heights = [_heights(column) for column in axes_of]
    worst_first = sorted(range(len(pairs)), key=lambda at: -pairs[at][1].bits_per_byte)
    for rank, at in enumerate(worst_first):
        share = rank / max(1, len(pairs) - 1)
        style = "-" if pairs[at][1].state == DONE else ":"
        axes.plot(range(len(names)), [column[at] for column in heights], style, color=colormaps["viridis_r"](share))
    for place, (column, height) in enumerate(zip(axes_of, heights, strict=True)):
        axes.axvline(place, color="black", linewidth=0.8)
        shown = {round(where, 3): value for where, value in zip(height, column, strict=True)}
        kept = sorted(shown)[:: max(1, len(shown) // 8)] if place == len(names) - 1 else sorted(shown)[:12]
        for where in kept:
            value = shown[where]
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            axes.text(place + 0.03, where, text, fontsize=8, va="center")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(names) - 0.5)
    axes.set_title("Trials: the darker, the better; dotted ones were stopped", fontsize=10)
    return _save(figure)


def _heights(column: Sequence[Any]) -> list[float]:
    """Place the values of one axis between 0 and 1."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in column):
        values = np.array(column, dtype=float)
        if len(values) and values.min() > 0 and values.max() / values.min() >= 4:
            values = np.log(values)
    else:
        order = sorted({str(value) for value in column})
        values = np.array([order.index(str(value)) for value in column], dtype=float)
    if not len(values) or values.max() == values.min():
        return [0.5] * len(values)
    return ((values - values.min()) / (values.max() - values.min())).tolist()


def draw_curves(trials: Sequence[Trial], records: Sequence[Record]) -> bytes:
    """Draw every trial's bits per byte over the tokens it has seen, the best eight by name; returns a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for rank, (trial, record) in enumerate(ranked(trials, records)):
        if not record.points:
            continue
        _, tokens, bits = zip(*record.points, strict=True)
        named = rank < 8
        label = f"{trial.number}: {describe_point(trial.point)}" if named else None
        axes.plot(tokens, bits, marker=".", linewidth=1.4 if named else 0.8, alpha=1 if named else 0.4, label=label)
    axes.set(xlabel="tokens", ylabel="bits per byte on held-out text")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize=7, loc="upper right")
    return _save(figure)


def draw_scaling(findings: "Findings") -> bytes:
    """Draw loss against compute: the ladder, its line with the interval, and what the preset really reached."""
    from matplotlib.figure import Figure

    scaling = findings.scaling
    assert scaling is not None
    flops = [rung.flops for rung, _ in findings.rungs]
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(flops, [bits for _, bits in findings.rungs], "o", color="tab:blue", label="the ladder")
    line = np.geomspace(min(flops), max(*flops, findings.target_flops), 60)
    middle, low, high = (list(each) for each in zip(*map(scaling.predict, line.tolist()), strict=True))
    axes.plot(line, middle, color="tab:blue", linewidth=1, label="its line")
    if math.isfinite(high[0]):
        axes.fill_between(line, low, high, color="tab:blue", alpha=0.15, label="95 % of trainings")
    if findings.target_bits is not None:
        axes.plot(
            findings.target_flops, findings.target_bits, "*", color="red", markersize=12, label="the preset, really"
        )
    axes.set(xscale="log", xlabel="FLOPs of a training", ylabel="bits per byte on held-out text")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return _save(figure)
