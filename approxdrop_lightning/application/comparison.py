"""Comparison of runs: quality, training time, and speed-up over conventional dropout."""

from collections import defaultdict
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

Record = dict[str, Any]

BASELINE = "standard"
#: Display names of the ``dropout=`` choices.
NAMES = {
    "standard": "conventional dropout",
    "row": "row pattern, interleaved",
    "paper": "row pattern of the paper",
    "tile": "tile pattern",
    "dropconnect": "DropConnect",
    "none": "no dropout",
}


class Metric(NamedTuple):
    """How a metric is displayed: its name, the factor its values are multiplied by, the unit, and the decimals."""

    name: str
    factor: float = 1.0
    unit: str = ""
    digits: int = 4


METRICS = {
    "acc": Metric("accuracy", 100.0, "%", 2),
    "ppl": Metric("perplexity", digits=2),
    "auc": Metric("area under the ROC curve"),
}


def metric_of(name: str) -> Metric:
    """The :class:`Metric` of a logged name such as ``test/acc``."""
    last = name.rpartition("/")[2]
    return METRICS.get(last, Metric(last))


def label(record: Record) -> str:
    """The row or curve that a run belongs to: its dropout and every other override that varies in the sweep."""
    others = [text.removeprefix("dropout.") for text in record.get("others", [])]
    return ", ".join([NAMES.get(record["dropout"], str(record["dropout"])), *others])


def mean_rate(record: Record) -> float:
    """The dropout rate of a run, averaged if it is given per layer."""
    rate = record["rate"]
    return fmean(rate) if isinstance(rate, list) else rate


def speed_up(record: Record, records: list[Record]) -> float | None:
    """Training speed relative to conventional dropout with the same model, rate and other settings.

    The baseline is the run with the same seed, or else the mean over all seeds. None if ``records`` has no baseline.
    """
    if not record.get("per_second"):
        return None
    alike = [other for other in records if _is_baseline_of(other, record)]
    of_seed = [other for other in alike if other["seed"] == record["seed"]]
    speeds = [other["per_second"] for other in of_seed or alike if other.get("per_second")]
    return record["per_second"] / fmean(speeds) if speeds else None


def _is_baseline_of(other: Record, record: Record) -> bool:
    return other["dropout"] == BASELINE and _setting(other) == _setting(record)


def _setting(record: Record) -> tuple[object, ...]:
    """The settings that a run must share with its baseline."""
    beside = [text for text in record.get("others", []) if not text.startswith("dropout.")]
    return record["model"], record["unit"], record["data_source"], str(record["rate"]), *beside


def comparison_table(records: list[Record]) -> Table:
    """Table with one row per dropout and rate; mean and standard deviation if there are several seeds.

    Args:
        records: Records of finished runs, as returned by :func:`train.result`.
    """
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["model"], str(record["rate"]), label(record)].append(record)
    several_models = len({model for model, _, _ in groups}) > 1
    several_seeds = max(map(len, groups.values())) > 1
    metrics = sorted({metric_of(record["metric"]).name for record in records})
    quality = f"test {metrics[0] if len(metrics) == 1 else 'score'}"
    columns = ["dropout", "rate", quality, "seconds of training", "times as fast"]
    table = Table(
        *(["model"] if several_models else []), *columns, *(["seeds"] if several_seeds else []),
        title=Text(f"side by side: {', '.join(sorted({record['data_source'] for record in records}))}"),
        title_justify="left",
    )  # fmt: skip
    # Sorted by rate, so that the rows to compare are adjacent.
    for (model, rate, name), runs in sorted(groups.items(), key=lambda group: (group[0][0], mean_rate(group[1][0]))):
        metric = metric_of(runs[0]["metric"])
        tests = [metric.factor * run["test"] for run in runs if run["test"] is not None]
        seconds = [run["seconds_per_step"] * run["steps"] for run in runs if run.get("seconds_per_step")]
        gains = [gain for run in runs if (gain := speed_up(run, records)) is not None]
        cells = [
            name,
            rate,
            _spread(tests, metric.digits, metric.unit),
            _spread(seconds, 1),
            _spread(gains, 2),
        ]
        # As Text: brackets and colons in a name must not be parsed as markup.
        table.add_row(
            *map(Text, [*([model] if several_models else []), *cells, *([str(len(runs))] if several_seeds else [])])
        )
    return table


def _spread(values: list[float], digits: int, unit: str = "") -> str:
    if not values:
        return "not measured"
    spread = f" ± {pstdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}{unit}"
