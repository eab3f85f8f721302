"""The result of a run: one record, as JSON for machines and as a table for people."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from hydra.utils import to_absolute_path
from rich.console import Console
from rich.table import Table
from rich.text import Text

from approxdrop_lightning.application.comparison import metric_of

RESULT_FILE = "result.json"  # in the folder of the run


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write ``record`` to ``path`` atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def curve(folder: Path, monitor: str) -> list[tuple[int, int, float]]:
    """``(epoch, step, value)`` of every validation of a metric, from the newest ``metrics.csv`` of a run."""
    logs = sorted(folder.rglob("metrics.csv"))
    if not logs:
        return []
    with logs[-1].open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line.get(monitor)]
    return [(int(line["epoch"]), int(line["step"]), float(line[monitor])) for line in lines]


def print_table(record: dict[str, Any]) -> None:
    """Print the result table of a run, given the record that :func:`train.result` returns."""
    table = Table(title="result", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(record):
        # As Text: brackets and colons in a path must not be parsed as markup.
        table.add_row(name, value if isinstance(value, Text) else Text(value))
    show(table)


def show(table: Table) -> None:
    """Print a table."""
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has no width limit, and wrapped paths cannot be copied
    console.print(table)


def _rows(record: dict[str, Any]) -> list[tuple[str, str | Text]]:
    unit, perplexity = record["unit"], record["metric"].endswith("ppl")
    metric = metric_of(record["metric"]).name
    rows: list[tuple[str, str | Text]] = [
        ("model", record["model"]),
        ("dropout", f"{record['dropout']}, rate {record['rate']}{', compiled' if record.get('compiled') else ''}"),
        (f"best validation {metric}", _number(record["best_validation"], perplexity)),
        (f"test {metric}", _number(record["test"], perplexity)),
        (f"training {unit} per second", _rate(record["per_second"])),
        ("realised dropout rate", _realised(record)),
        ("data source", _source(record["data_source"])),
    ]
    if record["best_perplexity"] is not None:
        rows.append(("best possible perplexity", _number(record["best_perplexity"], perplexity)))
    return [
        *rows,
        ("seed", str(record["seed"])),
        ("logs", _path(record["log_dir"])),
        ("best checkpoint", _path(record["best_checkpoint"])),
    ]


def _path(path: str) -> str:
    """Shorten a path below the directory in which the program was started to a relative one, for copying."""
    if not path:
        return "none was saved"
    started_in = to_absolute_path("")  # not the current one: Hydra may have changed it for the job
    return str(Path(path).relative_to(started_in)) if Path(path).is_relative_to(started_in) else path


def _number(value: float | None, perplexity: bool) -> str:
    if value is None:
        return "not measured"
    return f"{value:.2f}" if perplexity else f"{value:.2%}"


def _rate(value: float | None) -> str:
    return "not measured: no step after the warm-up" if value is None else f"{value:,.0f}"


def _realised(record: dict[str, Any]) -> str:
    value = record["realised_rate"]
    if value == "nominal":
        return f"{record['rate']} (nominal: conventional dropout is not counted)"
    return f"{value:.4f}"


def _source(source: str) -> str | Text:
    if "synthetic" not in source:
        return source
    return Text(f"{source.upper()}: not real data, the numbers say little", style="bold red")
