"""Pictures of a sweep: quality and speed by rate, and quality by epoch."""

import os
from collections import defaultdict
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

Record = dict[str, Any]


def plot_summary(records: list[Record], path: Path) -> None:
    """Metric and throughput against rate, one line per pattern: mean over seeds, bars of one deviation.

    Args:
        records: Of jobs that were tested; nothing is drawn if there are none.
        path: The PNG.
    """
    if not records:
        return
    plt = _pyplot()
    tasks = sorted({(record["metric"], record["unit"]) for record in records})
    size = (10, 4 * len(tasks))
    figure, axes = plt.subplots(len(tasks), 2, figsize=size, squeeze=False, layout="constrained")
    for (metric, unit), (left, right) in zip(tasks, axes, strict=True):
        chosen = [record for record in records if record["metric"] == metric]
        speed = f"training {unit} per second"
        colors = {line: f"C{i}" for i, line in enumerate(dict.fromkeys(record["line"] for record in chosen))}
        for axis, key, label in ((left, "test", metric), (right, "per_second", speed)):
            for line, points in _points(chosen, key).items():
                rates = sorted(points)
                means = [fmean(points[rate]) for rate in rates]
                spread = [pstdev(points[rate]) for rate in rates]
                axis.errorbar(rates, means, yerr=spread, marker="o", capsize=3, label=line, color=colors[line])
            axis.set(xlabel="dropout rate", ylabel=label)
            axis.grid(alpha=0.3)
        left.legend()
    sources = sorted({record["data_source"] for record in records})
    figure.suptitle(f"data source: {', '.join(sources)}")
    _save(figure, path)


def plot_curves(records: list[Record], path: Path) -> None:
    """Validation metric by epoch, one panel per rate, one line per pattern: mean over seeds.

    Args:
        records: Of jobs with a ``curve`` of :func:`.results.curve`; nothing is drawn if there are none.
        path: The PNG.
    """
    if not records:
        return
    plt = _pyplot()
    tasks = sorted({record["monitor"] for record in records})
    rates = sorted({_rate(record) for record in records})
    size = (4 * len(rates), 4 * len(tasks))
    figure, axes = plt.subplots(
        len(tasks), len(rates), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for monitor, row in zip(tasks, axes, strict=True):
        of_task = [record for record in records if record["monitor"] == monitor]
        colors = {line: f"C{i}" for i, line in enumerate(dict.fromkeys(record["line"] for record in of_task))}
        for rate, axis in zip(rates, row, strict=True):
            values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
            for record in of_task:
                for epoch, _, value in record["curve"] if _rate(record) == rate else []:
                    values[record["line"]][epoch + 1].append(value)
            for line, by_epoch in values.items():
                axis.plot(
                    list(by_epoch), [fmean(v) for v in by_epoch.values()], marker=".", label=line, color=colors[line]
                )
            axis.set(xlabel="epoch", ylabel=monitor, title=f"dropout rate {rate:g}")
            if monitor.endswith("ppl"):
                axis.set_yscale("log")
                axis.yaxis.set_minor_formatter("{x:.0f}")
                axis.yaxis.set_major_formatter("{x:.0f}")
            axis.grid(alpha=0.3, which="both")
            if values:  # not every pattern is there at every rate
                axis.legend()
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    """Write a picture at once: whoever reads finds all of it or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    _pyplot().close(figure)
    temporary.replace(path)


def _rate(record: Record) -> float:
    """The rate of a job; rates given per layer count by their mean."""
    rate = record["rate"]
    return fmean(rate) if isinstance(rate, list) else rate


def _points(records: list[Record], key: str) -> dict[str, dict[float, list[float]]]:
    """Line -> rate -> values, one per seed."""
    lines: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record[key] is not None:
            lines[record["line"]][_rate(record)].append(record[key])
    return lines
