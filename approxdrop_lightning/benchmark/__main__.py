"""Command line of the benchmark: verify the contenders, time them in turn, print a table, append to a CSV."""

from __future__ import annotations

import argparse
import csv
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

from approxdrop_lightning.benchmark import contenders, gpu, measure, ops, workloads
from approxdrop_lightning.benchmark.contenders import BASELINES, PATTERNS, Step
from approxdrop_lightning.benchmark.workloads import Workload
from approxdrop_lightning.memory import keep_freed_memory
from approxdrop_lightning.ops.backend import BACKENDS
from approxdrop_lightning.text_table import text_table

COLUMNS = (
    "workload", "rate", "contender", "median_ms", "first_quartile_ms", "third_quartile_ms", "to_conventional",
    "to_compiled", "to_none", "ceiling", "of_ceiling", "peak_mb",
)  # fmt: skip

#: Defaults by workload: widths of the hidden layers, and samples per batch.
HIDDEN = {"mlp": [2048, 2048], "lstm": [650], "transformer": [256], "sign": [512], "ctr": [1024, 512, 512]}
BATCH = {"mlp": 128, "lstm": 20, "transformer": 20, "sign": 5000, "ctr": 4096}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the benchmark and return the rows of its table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["gpu"]:
        return gpu.main(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.malloc == "keep":
        keep_freed_memory()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.set_default_dtype(getattr(torch, options.dtype))
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch._inductor.config.fallback_random = options.fallback_random
    rows = []
    kinds = (*BATCH, "ops") if options.kind == "all" else (options.kind,)
    for kind in kinds:
        if kind == "ops":
            rows += ops.rows(options)
            continue
        for rate in options.rate:
            rows += _compare(_workload(kind, options), rate, options)
    surroundings = measure.surroundings(options.device)
    _show(rows, surroundings)
    if options.csv:
        _append(options.csv, [row | surroundings for row in rows])
    if options.plot:
        _plot(rows, options.plot)
    return rows


def _listed(values: dict[str, int]) -> str:
    return ", ".join(f"{kind}: {value:,}" for kind, value in values.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m approxdrop_lightning.benchmark",
        description="Whole training steps (draw, forward, loss, backward, optimizer), all contenders taking turns.",
        epilog="`gpu` in place of a workload benchmarks a GPU within a few minutes and has its own options.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("kind", choices=(*BATCH, "ops", "all"))
    parser.add_argument(
        "--hidden", type=int, nargs="+", help="widths of the hidden layers; one for lstm, transformer and sign"
    )
    parser.add_argument("--batch", type=int, help=f"samples per batch; if not given {_listed(BATCH)}")
    parser.add_argument("--layers", type=int, help="layers; if not given lstm: 2, transformer: 4")
    parser.add_argument("--steps", type=int, help="words of each text; if not given lstm: 35, transformer: 64")
    parser.add_argument("--batch-norm", action="store_true", help="ctr: a batch norm before each ReLU")
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--rate", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--pattern", nargs="*", choices=tuple(PATTERNS), default=["row", "shared"])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["auto"])
    parser.add_argument("--baseline", nargs="*", choices=BASELINES, default=["none", "narrow"],
                        help="beside conventional dropout, which always runs")  # fmt: skip
    parser.add_argument("--compile", action="store_true",
                        help="row patterns and conventional dropout under torch.compile as well")  # fmt: skip
    parser.add_argument("--fallback-random", action="store_true",
                        help="compiled code uses PyTorch's random numbers instead of inductor's")  # fmt: skip
    parser.add_argument("--recurrent", action="store_true", help="drop the LSTM's recurrent inputs too")
    parser.add_argument("--orders", type=int, nargs="+", help="see ApproxDropout; a contender for each")
    parser.add_argument("--group-rows", type=int, nargs="+", help="see ApproxDropout; a contender for each")
    parser.add_argument("--min-gain", type=int, help="see ApproxDropout")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--tf32", action="store_true", help="float32 products in tf32, on a GPU")
    parser.add_argument("--malloc", default="keep", choices=("keep", "default"),
                        help="keep: with approxdrop_lightning.keep_freed_memory()")  # fmt: skip
    parser.add_argument("--threads", type=int, help="PyTorch's own choice if not given")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--consecutive", type=int, default=3, help="steps in a row at each contender's turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="print where each contender's step spends its time")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    parser.add_argument("--plot", type=Path, help="picture of the ratios to conventional dropout")
    return parser


def _workload(kind: str, options: argparse.Namespace) -> Workload:
    torch.manual_seed(options.seed)
    hidden, batch = options.hidden or HIDDEN[kind], options.batch or BATCH[kind]
    if kind == "mlp":
        workload = workloads.mlp([784, *hidden, 10], batch)
    elif kind == "lstm":
        workload = workloads.lstm(hidden[0], options.layers or 2, options.steps or 35, batch, options.vocabulary)
    elif kind == "transformer":
        sizes = options.layers or 4, options.steps or 64
        workload = workloads.transformer(hidden[0], *sizes, batch, options.vocabulary)
    elif kind == "sign":
        workload = workloads.sign(hidden[0], batch)
    else:
        workload = workloads.ctr(hidden, batch, options.batch_norm)
    # Moved explicitly, since a default device would slow down every PyTorch call of a step.
    workload.batch = (workload.batch[0].to(options.device), workload.batch[1].to(options.device))
    return workload


def _compare(workload: Workload, rate: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all contenders for one workload and rate; return their rows."""
    torch.compiler.reset()  # networks of one class share a limit of graphs, those of the rate before as well
    steps = {"conventional": contenders.contender(workload, "conventional", rate, options.seed)}
    for name in dict.fromkeys([*options.baseline, *(["compiled"] if options.compile else [])]):
        if name in ("sliced", "sliceout") and workload.sliced is None:
            continue
        steps[name] = contenders.contender(workload, name, rate, options.seed)
    for pattern, (name, settings) in product(options.pattern, _settings(options)):
        for backend in options.backend:
            step = contenders.contender(workload, pattern, rate, options.seed, backend=backend, **settings)
            if options.dtype in ("float32", "float64") and not options.tf32:
                contenders.verify(step, rate, options.seed, backend=backend, **settings)
            steps[pattern + name if backend == "auto" else f"{pattern}{name} ({backend})"] = step
        if options.compile and PATTERNS[pattern].get("pattern", "row") == "row":
            steps[f"{pattern}{name}, compiled"] = _compiled(workload, pattern, rate, options, settings)
    for step in steps.values():
        if step.compiled:
            step.compile_all()
    seconds = measure.interleaved(steps, options.repeats, consecutive=options.consecutive)
    rows = []
    for name, step in steps.items():
        first, median, third = measure.quartiles(seconds[name])
        faster = measure.ratio(seconds["conventional"], seconds[name])
        ceiling = 1 / (1 - step.report.saved) if step.report else None
        step.optimizer.zero_grad()
        rows.append(
            {
                "workload": workload.name,
                "rate": rate,
                "contender": name,
                "median_ms": median * 1e3,
                "first_quartile_ms": first * 1e3,
                "third_quartile_ms": third * 1e3,
                "to_conventional": faster,
                "to_compiled": measure.ratio(seconds["compiled"], seconds[name]) if "compiled" in seconds else None,
                "to_none": measure.ratio(seconds["none"], seconds[name]) if "none" in seconds else None,
                "ceiling": ceiling,
                "of_ceiling": faster / ceiling if ceiling else None,
                "peak_mb": measure.peak_memory(step),
            }
        )
        if options.profile:
            print(f"\n{workload.name}, rate {rate:g}: {name}\n{measure.where_time_goes(step)}")
    return rows


def _settings(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Options of the contenders, and what distinguishes their names."""
    common = {key: value for key in ("min_gain", "recurrent") if (value := getattr(options, key)) is not None}
    several = {key: values for key in ("orders", "group_rows") if (values := getattr(options, key)) is not None}
    found = []
    for values in product(*several.values()):
        own = dict(zip(several, values, strict=True))
        names = (f", {key} {value}" for key, value in own.items() if len(several[key]) > 1)
        found.append(("".join(names), common | own))
    return found


def _compiled(
    workload: Workload, pattern: str, rate: float, options: argparse.Namespace, settings: dict[str, Any]
) -> Step:
    step = contenders.contender(workload, pattern, rate, options.seed, **settings)
    if options.dtype in ("float32", "float64") and not options.tf32:
        contenders.verify_compiled(step, rate, options.seed, **settings)
    step.compile()
    return step


def _show(rows: list[dict[str, Any]], surroundings: dict[str, str]) -> None:
    numbers = [c for c in COLUMNS if any(isinstance(row.get(c), float) for row in rows)]
    print(text_table(COLUMNS, [[_text(row.get(c)) for c in COLUMNS] for row in rows], numbers))
    print(", ".join(surroundings.values()))


def _text(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure, axes = pyplot.subplots(1, len(workloads), figsize=(5 * len(workloads), 4), squeeze=False)
    for axis, workload in zip(axes[0], workloads, strict=True):
        mine = [row for row in rows if row["workload"] == workload]
        for name in dict.fromkeys(row["contender"] for row in mine):
            points = [(row["rate"], row["to_conventional"]) for row in mine if row["contender"] == name]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(title=workload, xlabel="dropout rate", ylabel="times as fast as conventional dropout")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
