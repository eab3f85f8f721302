"""What a GPU shows within some minutes: ``python -m approxdrop_lightning.benchmark gpu --minutes 10``.

Parts in the order of what is needed first, each with its share of the time; CSV files are written after each case, so
that a run that is cut off leaves what it has found. A case that fails is a row with its error, not the end.
"""

from __future__ import annotations

import argparse
import csv
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from approxdrop_lightning.benchmark import measure
from approxdrop_lightning.benchmark.gpu import correctness, products, steps
from approxdrop_lightning.benchmark.gpu.measuring import Case, Row, Scale


class Deadline:
    """Time that a part may take.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is over."""
        return time.monotonic() >= self._end


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run all parts; returns their rows."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        _parser().error("--device cuda: PyTorch sees no CUDA device; --device cpu is a smoke test of the command")
    scale, seconds = Scale.of(options.device), 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    report = options.output / "gpu.md"
    surroundings = measure.surroundings(options.device)
    report.write_text("# " + ", ".join(surroundings.values()) + "\n", encoding="utf-8")
    found: list[Row] = []
    for name, title, share, part in PARTS:
        if options.part and name not in options.part:
            continue
        start, path = time.monotonic(), options.output / f"{name}.csv"
        rows: list[Row] = []
        for row in _run(part(options.device, scale), Deadline(seconds * share)):
            rows.append(row)
            _write(path, [row | surroundings for row in rows])  # a run that is cut off leaves what it has found
        found += [{"part": name} | row for row in rows]
        text = f"\n## {title}\n\n{_markdown(rows)}\n\n{time.monotonic() - start:.0f} s of {seconds * share:.0f}\n"
        with report.open("a", encoding="utf-8") as file:
            file.write(text)
        print(text, flush=True)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m approxdrop_lightning.benchmark gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="for all parts together")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, default=Path("gpu_results"), help="folder of the CSV files and gpu.md")
    parser.add_argument("--part", nargs="+", choices=[name for name, *_ in PARTS], help="only these")
    return parser


def _run(cases: Iterator[Case], deadline: Deadline) -> Iterator[Row]:
    """Rows of the cases: what they are and what they found, or why they did not."""
    for what, case in cases:
        if deadline.passed:
            yield what | {"error": f"not run, nor the {sum(1 for _ in cases)} after it: the time is over"}
            return
        try:
            found = case()
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            found = {"error": f"{type(error).__name__}: {lines[0]}"}
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        yield what | found


def _write(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def _markdown(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_text(row.get(c)) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "/")


#: Name, title, share of the time, cases.
PARTS: tuple[tuple[str, str, float, Callable[[str, Scale], Iterator[Case]]], ...] = (
    ("correctness", "1. Correctness", 0.12, correctness.cases),
    ("products", "2. mm against strided bmm, forward and both gradients", 0.1, products.product_cases),
    ("copies", "3. Pack and unpack", 0.04, products.copy_cases),
    ("steps", "4 and 5. Whole steps, and the host's share", 0.74, steps.cases),
)
