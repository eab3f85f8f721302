"""Training time needed to match the quality of the baseline.

``python -m approxdrop_lightning.application.time_to_quality SWEEP``
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from rich.text import Text

from approxdrop_lightning.application.results import RESULT_FILE, curve, show

Run = dict[str, Any]
Row = tuple[str, ...]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print one row per dropout and rate, and return the rows."""
    parser = argparse.ArgumentParser(
        prog="python -m approxdrop_lightning.application.time_to_quality",
        description="Training time until the baseline's best validation quality at the same rate is reached.",
    )
    parser.add_argument("folder", type=Path, nargs="+", help="folders of sweeps or runs")
    parser.add_argument("--baseline", default="standard", help="name of its dropout (default: standard)")
    parser.add_argument(
        "--within",
        type=float,
        default=0.0,
        metavar="PERCENT",
        help="by how many percent the quality asked of all, the baseline too, is worse than its best (default: 0)",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.within < 100:
        parser.error(f"--within must be in [0, 100), got {options.within:g}")
    runs = [run for folder in options.folder for run in _runs(folder)]
    if not any(run["dropout"] == options.baseline for run in runs):
        parser.error(f"no finished run with dropout={options.baseline} below {', '.join(map(str, options.folder))}")
    rows = compare(runs, options.baseline, options.within)
    table = Table("model", "rate", "dropout", "seeds that reach it", "epochs", "seconds", "times the baseline's")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text: brackets in a name must not be parsed as markup
    show(table)
    return rows


def _runs(folder: Path) -> Iterator[Run]:
    """The finished runs below a folder, each with its curve: ``(epoch, step, validation metric)``."""
    for path in sorted(folder.rglob(RESULT_FILE)):
        run = json.loads(path.read_text(encoding="utf-8"))
        run["curve"] = curve(path.parent, run["monitor"])
        if run["curve"] and run.get("seconds_per_step"):
            yield run


def compare(runs: list[Run], baseline: str, within: float = 0.0) -> list[Row]:
    """One row per dropout and rate, with means over the seeds that reach the baseline's best quality.

    Args:
        runs: Records of runs with their curves.
        baseline: Name of the dropout to compare with, for the same model, rate and seed.
        within: Tolerance in percent: how much worse than the baseline's best the target quality is.
    """
    of_seed = {_key(run): run for run in runs if run["dropout"] == baseline}
    found: dict[Row, list[tuple[Run, Run]]] = defaultdict(list)
    for run in runs:
        if _key(run) in of_seed:
            found[run["model"], str(run["rate"]), run["dropout"]].append((run, of_seed[_key(run)]))
    rows = []
    for name, pairs in sorted(found.items()):
        reached = [(_reach(run, base, within), _reach(base, base, within)) for run, base in pairs]
        times = [(own[0], own[1], own[1] / base[1]) for own, base in reached if own and base]
        epochs, seconds, ratio = (fmean(part) for part in zip(*times, strict=True)) if times else (None,) * 3
        numbers = ("-", "-", "-") if epochs is None else (f"{epochs:.1f}", f"{seconds:.1f}", f"{ratio:.2f}")
        rows.append((*name, f"{len(times)} of {len(pairs)}", *numbers))
    return rows


def _key(run: Run) -> Row:
    return run["model"], str(run["rate"]), str(run["seed"])


def _reach(run: Run, baseline: Run, within: float) -> tuple[int, float] | None:
    """Epochs and seconds until a run comes within the tolerance of the baseline's best; None if it never does."""
    lower = run["metric"].endswith("ppl")  # lower is better
    goal = (min if lower else max)(value for *_, value in baseline["curve"])
    goal *= 1 + within / 100 if lower else 1 - within / 100
    for epoch, step, value in run["curve"]:
        if value <= goal if lower else value >= goal:
            return epoch + 1, (step + 1) * run["seconds_per_step"]
    return None


if __name__ == "__main__":
    main()
