"""Plots of a sweep: quality and speed-up by rate, and quality by epoch."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from types import ModuleType
from typing import TYPE_CHECKING

from approxdrop_lightning.application.comparison import BASELINE, Record, label, mean_rate, metric_of, speed_up

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

#: Fixed colours by dropout, the same in every plot; other lines take the remaining ones.
_COLOURS = {"standard": "0.35", "row": "C0", "paper": "C1", "tile": "C2", "dropconnect": "C4", "none": "C5"}
_MORE_COLOURS = ("C3", "C6", "C8", "C9", "C7")
_PARTS = {"test": "test", "val": "validation"}

Points = dict[str, dict[float, list[float]]]


def plot_summary(records: list[Record], path: Path) -> None:
    """Plot quality and speed-up against rate, one line per dropout, with means and standard deviations over seeds.

    Speed-up is relative to conventional dropout in the same sweep; without it the throughput is shown.

    Args:
        records: Records of jobs with a test score; if there are none, nothing is drawn.
        path: PNG file to write.
    """
    if not records:
        return
    plt = _pyplot()
    tasks = sorted({(record["metric"], record["unit"]) for record in records})
    figure, axes = plt.subplots(
        len(tasks), 2, figsize=(10.5, 0.9 + 3.8 * len(tasks)), squeeze=False, layout="constrained"
    )
    handles: dict[str, Artist | ErrorbarContainer] = {}
    for (metric, unit), (left, right) in zip(tasks, axes, strict=True):
        chosen = [record for record in records if (record["metric"], record["unit"]) == (metric, unit)]
        tests = [_scaled(metric, record["test"]) for record in chosen]
        gains = [speed_up(record, chosen) for record in chosen]
        compared = any(gain is not None for gain in gains)
        quality = _points(chosen, tests)
        speed = _points(chosen, gains if compared else [record["per_second"] for record in chosen])
        handles |= _lines(left, quality, chosen)
        handles |= _lines(right, speed, chosen)
        left.set(ylabel=_axis_label(metric))
        _limit(left, metric, tests)
        right.set(ylabel="times as fast as conventional dropout" if compared else f"training {unit} per second")
        right.set_ylim(bottom=0)
        for axis in (left, right):
            axis.set(xlabel="dropout rate")
            _rate_axis(axis, {mean_rate(record) for record in chosen})
            axis.grid(alpha=0.3)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    figure.suptitle(_title(records), fontsize=11)
    _save(figure, path)


def plot_curves(records: list[Record], path: Path) -> None:
    """Plot the validation metric by epoch, a panel per rate and a line per dropout, with deviations over seeds.

    Args:
        records: Records of jobs with a ``curve``, see :func:`.results.curve`; if there are none, nothing is drawn.
        path: PNG file to write.
    """
    if not records:
        return
    plt = _pyplot()
    tasks = sorted({record["monitor"] for record in records})
    rates = sorted({mean_rate(record) for record in records})
    figure, axes = plt.subplots(
        len(tasks), len(rates), figsize=(max(5.5, 3.8 * len(rates)), 0.9 + 3.8 * len(tasks)),
        squeeze=False, sharey="row", layout="constrained",
    )  # fmt: skip
    handles: dict[str, Artist | ErrorbarContainer] = {}
    for monitor, row in zip(tasks, axes, strict=True):
        of_task = [record for record in records if record["monitor"] == monitor]
        colours = _colours(of_task)
        for rate, axis in zip(rates, row, strict=True):
            values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
            for record in of_task:
                for epoch, _, value in record["curve"] if mean_rate(record) == rate else []:
                    values[label(record)][epoch + 1].append(_scaled(monitor, value))
            for line, by_epoch in values.items():
                epochs, means = list(by_epoch), [fmean(v) for v in by_epoch.values()]
                spread = [pstdev(v) for v in by_epoch.values()]
                (handles[line],) = axis.plot(epochs, means, marker=".", label=line, color=colours[line])
                if any(spread):
                    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
                    axis.fill_between(epochs, low, high, color=colours[line], alpha=0.15, linewidth=0)
            _epoch_axis(axis, max((max(by_epoch) for by_epoch in values.values()), default=1))
            axis.set(xlabel="epoch", title=f"dropout rate {rate:g}")
            axis.grid(alpha=0.3)
        if monitor.endswith("ppl"):
            _log_axis(row[0])
        _limit(row[0], monitor, [_scaled(monitor, value) for record in of_task for *_, value in record["curve"]])
        row[0].set_ylabel(_axis_label(monitor))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    figure.suptitle(_title(records), fontsize=11)
    _save(figure, path)


def _pyplot() -> ModuleType:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Figure, path: Path) -> None:
    """Write a figure atomically and close it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    _pyplot().close(figure)
    temporary.replace(path)


def _title(records: list[Record]) -> str:
    models = ", ".join(sorted({record["model"] for record in records}))
    sources = ", ".join(sorted({record["data_source"] for record in records}))
    seeds = len({record["seed"] for record in records})
    # An unescaped dollar sign would start math mode.
    return f"{models} on {sources}; {seeds} seed{'s' * (seeds > 1)}".replace("$", r"\$")


def _axis_label(metric: str) -> str:
    part = metric.partition("/")[0]
    shown = metric_of(metric)
    return f"{_PARTS.get(part, part)} {shown.name}" + (f" ({shown.unit})" if shown.unit else "")


def _scaled(metric: str, value: float) -> float:
    return metric_of(metric).factor * value


def _points(records: list[Record], values: Sequence[float | None]) -> Points:
    """Map each line to its rates, and each rate to its values, one per seed."""
    lines: Points = defaultdict(lambda: defaultdict(list))
    for record, value in zip(records, values, strict=True):
        if value is not None:
            lines[label(record)][mean_rate(record)].append(value)
    return lines


def _colours(records: list[Record]) -> dict[str, str]:
    """Assign each line a colour: its dropout's own, unless it is already taken."""
    chosen: dict[str, str] = {}
    spare = iter(_MORE_COLOURS * (1 + len(records)))
    for record in records:
        if (line := label(record)) not in chosen:
            own = _COLOURS.get(record["dropout"])
            chosen[line] = own if own and own not in chosen.values() else next(spare)
    return chosen


def _lines(axis: Axes, lines: Points, records: list[Record]) -> dict[str, ErrorbarContainer]:
    """Draw means and deviations, slightly offset so that coinciding points stay visible; return the handles."""
    colours, drawn = _colours(records), {}
    rates = sorted({mean_rate(record) for record in records})
    gap = min((b - a for a, b in itertools.pairwise(rates)), default=0.2)
    baseline = {label(record) for record in records if record["dropout"] == BASELINE}
    for i, (line, points) in enumerate(lines.items()):
        places = sorted(points)
        shifted = [rate + gap * 0.06 * (i - (len(lines) - 1) / 2) for rate in places]
        means, spread = ([f(points[rate]) for rate in places] for f in (fmean, pstdev))
        drawn[line] = axis.errorbar(
            shifted, means, yerr=spread if any(spread) else None, marker="o", markersize=5, capsize=3, label=line,
            color=colours[line], linestyle="--" if line in baseline else "-",
        )  # fmt: skip
    return drawn


def _rate_axis(axis: Axes, rates: set[float]) -> None:
    """Put ticks at the rates only."""
    low, high = min(rates), max(rates)
    margin = 0.12 * (high - low) or 0.1
    axis.set_xlim(low - margin, high + margin)
    axis.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])


def _epoch_axis(axis: Axes, last: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(0.5, last + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _log_axis(axis: Axes) -> None:
    """Make the axis logarithmic, with plain numbers and enough ticks for less than one decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:.0f}")


def _limit(axis: Axes, metric: str, values: list[float]) -> None:
    """Set limits wide enough that negligible differences do not fill the axis, and mark a truncated axis."""
    low, high = min(values), max(values)
    percent = metric_of(metric).unit == "%"
    least = 2.0 if percent else 0.1 * high if metric.endswith("ppl") else 0.02
    missing = max(0.0, least - (high - low)) / 2
    margin = 0.1 * (high - low + 2 * missing)
    bottom, top = max(0.0, low - missing - margin), high + missing + margin
    if percent:
        top = min(top, 100.5)
    elif metric.endswith("ppl"):
        bottom = max(bottom, 0.95 * low)
    axis.set_ylim(bottom, top)
    if bottom > 0 and axis.get_yscale() == "linear":
        axis.annotate("axis cut", (0.02, 0.015), xycoords="axes fraction", fontsize=7, color="0.4")
        axis.plot(
            [0, 0], [0, 0.02], marker=[(-1, -0.5), (1, 0.5)], markersize=8, color="k", linestyle="none", mew=1,
            transform=axis.transAxes, clip_on=False,
        )  # fmt: skip
