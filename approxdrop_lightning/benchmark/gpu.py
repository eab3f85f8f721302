"""What a GPU shows within some minutes: ``python -m approxdrop_lightning.benchmark gpu --minutes 10``.

Parts in the order of what is needed first, each with its share of the time; CSV files are written after each case, so
that a run that is cut off leaves what it has found. A case that fails is a row with its error, not the end.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approxdrop_lightning import functional
from approxdrop_lightning.benchmark import contenders, measure, workloads
from approxdrop_lightning.benchmark.workloads import Workload
from approxdrop_lightning.ops.pack import pack_ops, reference
from approxdrop_lightning.patterns.tile import TilePattern
from approxdrop_lightning.step_graphs import CudaCapture, StepGraphs
from approxdrop_lightning.surgery import check_replayable, replay_key

Row = dict[str, Any]
#: (groups, share of the units that each keeps) of the default distribution's main pair, by rate.
_PATTERNS = {0.3: (2, 0.7), 0.5: (2, 0.5), 0.7: (3, 0.3)}
_RATES = (0.5, 0.7, 0.3)
_BLOCK = 16


@dataclass(frozen=True)
class Scale:
    """Sizes: those of the issue on a GPU, tiny ones elsewhere, where only the way through is of interest."""

    widths: tuple[int, ...]
    rows: tuple[int, ...]
    dtypes: tuple[str, ...]
    rounds: int
    seconds: float  # of a round, about
    backend: str  # of torch.compile

    @classmethod
    def of(cls, device: str) -> Scale:
        """Sizes for a device."""
        if device == "cuda":
            return cls((4096, 2048), (16384, 65536, 4096), ("bf16", "tf32", "fp32"), 5, 0.05, "inductor")
        return cls((96,), (48,), ("fp32",), 2, 0.01, "aot_eager")


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


Case = tuple[Row, Callable[[], Row]]


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


# --- measuring ---


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(run: Callable[[], Any], device: str, scale: Scale) -> float:
    """Seconds of a call, without the host: as a replayed graph of several calls where there is a GPU."""
    count = _count(run, device, scale)
    repeat: Callable[[], Any]
    if device == "cuda":
        capture = CudaCapture()
        capture.warm_up(run)

        def several() -> None:
            for _ in range(count):
                run()

        _, repeat = capture.capture(several)
        repeat()
    else:

        def repeat() -> None:
            for _ in range(count):
                run()

    times = []
    for _ in range(scale.rounds):
        _synchronize(device)
        start = time.perf_counter()
        repeat()
        _synchronize(device)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def _count(run: Callable[[], Any], device: str, scale: Scale) -> int:
    """How many calls fill a round; the first ones compile and choose."""
    run()
    run()
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return max(1, min(20, int(scale.seconds / (time.perf_counter() - start))))


def _type(name: str) -> torch.dtype:
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


def _kept(n: int, rate: float, device: str) -> Tensor:
    """``[groups, kept units]``: whole blocks in random order, as the default pattern has them."""
    groups, share = _PATTERNS[rate]
    blocks = n // _BLOCK
    kept = round(blocks * share)
    order = torch.randperm(blocks)
    shift = min(kept, (blocks - kept) // max(1, groups - 1))  # overlapping where more than half are kept
    chosen = torch.stack([order[g * shift : g * shift + kept] for g in range(groups)])
    units = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK)).view(groups, -1)
    return units.to(device=device, dtype=torch.int32)


def _tables(n_rows: int, n_columns: int, rate: float, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tables of a weight of which outputs and inputs are dropped, and their inverse."""
    rows, columns = _kept(n_rows, rate, device), _kept(n_columns, rate, device)
    layers = len(rows) if rate < 0.5 else 1
    return rows, columns, reference.slots(rows, n_rows, layers), reference.slots(columns, n_columns, layers)


# --- (1) correctness ---


def _correctness(device: str, scale: Scale) -> Iterator[Case]:
    names = ("fp32", "fp16", "bf16") if device == "cuda" else ("fp32",)
    for name in names:
        for rate in _RATES:
            for n in (256, 650) if device == "cuda" else (64, 50):
                what = {"what": f"pack and unpack {n}x{n}", "dtype": name, "rate": rate}
                yield what, partial(_check_pack, n, rate, name, device)
    for name in names:
        what = {"what": "tiles 300x420", "dtype": name, "rate": 0.5}
        yield what, partial(_check_tiles, name, device)
    backends = ("auto", "triton") if device == "cuda" else ("auto",)
    for pattern in ("row", "shared", "tile"):
        for backend in backends:
            what = {"what": f"MLP, {pattern}, {backend}", "dtype": "fp32", "rate": 0.5}
            yield what, partial(_check_network, pattern, backend, False, device)
    what = {"what": "MLP, row, auto, torch.compile", "dtype": "fp32", "rate": 0.5}
    yield what, partial(_check_network, "row", "auto", True, device)
    yield {"what": "captured step, conventional", "dtype": "fp32", "rate": 0.0}, partial(_check_capture, device)


def _check_pack(n: int, rate: float, name: str, device: str) -> Row:
    dtype = _type(name)
    if n % _BLOCK:
        groups = 2
        rows, columns = (torch.randperm(n)[: n - n % groups].view(groups, -1).int().to(device) for _ in range(2))
        tables = (rows, columns, reference.slots(rows, n, 1), reference.slots(columns, n, 1))
        run = 1
    else:
        tables, run = _tables(n, n, rate, device), _BLOCK
    dense = torch.randn(n, n, device=device).to(dtype)
    packed = pack_ops.pack(dense, *tables, run)
    error = (packed - reference.pack(dense, *tables[:2])).abs().max().item()
    wanted = reference.unpack(packed, *tables[2:], n, n)
    error = max(error, (pack_ops.unpack(packed, *tables, n, n, run) - wanted).abs().max().item())
    return {"error_max": error, "ok": error <= (0.0 if rate >= 0.5 else 0.05)}


def _check_tiles(name: str, device: str) -> Row:
    dtype = _type(name)
    pattern = TilePattern(300, 420, 2, 1, 1, 16)
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((70, 420), (300, 420)))
    found = functional.tile_linear(x, weight, None, pattern, 2.0).double()
    wanted = functional.tile_linear(x.double(), weight.double(), None, pattern, 2.0, "reference")
    error = ((found - wanted).norm() / wanted.norm()).item()
    return {"error_max": error, "ok": error < (1e-4 if dtype == torch.float32 else 1e-2)}


def _check_network(pattern: str, backend: str, compiled: bool, device: str) -> Row:
    torch.backends.cuda.matmul.allow_tf32 = False
    options: dict[str, Any] = {"backend": backend, "min_gain": 0}
    workload = _on(workloads.mlp([100, 256, 192, 10], 96), device)
    step = contenders.contender(workload, pattern, 0.5, **options)
    if not compiled:
        contenders.verify(step, 0.5, **options)  # raises
        return {"ok": True}
    _check_compiled(step, 0.5, device)
    return {"ok": True}


def _check_compiled(step: contenders.Step, rate: float, device: str) -> None:
    """Loss and gradients against the network with masks, whose patterns are those that the step says it had."""
    step.compile("inductor" if device == "cuda" else "aot_eager")
    assert step.report is not None
    x, target = step.workload.batch
    linears = [m for m in step.model.modules() if isinstance(m, nn.Linear)]
    for number in range(6):
        step.optimizer.zero_grad()
        loss = step.loss_and_gradients()
        leaves = [p.detach().clone().requires_grad_() for m in linears for p in (m.weight, m.bias)]
        hidden = x
        for i, site in enumerate(step.report.sites):
            pattern: Any = site.last_patterns[0]
            mask = pattern.mask(len(x), dtype=torch.float32, value=1 / (1 - rate)).to(device)
            hidden = F.linear(hidden, leaves[2 * i], leaves[2 * i + 1]).relu() * mask
        wanted = F.cross_entropy(F.linear(hidden, leaves[-2], leaves[-1]), target)
        grads = torch.autograd.grad(wanted, leaves)
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-3, atol=1e-4)
        for mine, theirs in zip((p.grad for m in linears for p in (m.weight, m.bias)), grads, strict=True):
            assert mine is not None
            error = ((mine - theirs).norm() / theirs.norm()).item()
            if not error < 5e-3:
                raise AssertionError(f"step {number}: a gradient is off by {error:.1%} of its norm")


def _check_capture(device: str) -> Row:
    if device != "cuda":
        return {"ok": None, "note": "only with a GPU"}
    workload = _on(workloads.mlp([100, 256, 192, 10], 96), device)
    steps = [contenders.contender(workload, "none", 0.0) for _ in range(2)]
    graphs = StepGraphs(CudaCapture())
    for _ in range(8):
        graphs.run(None, [], lambda _: steps[0]())
        steps[1]()
    for a, b in zip(steps[0].model.parameters(), steps[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return {"ok": graphs.counts.replayed == 5, "note": str(graphs.counts)}


def _on(workload: Workload, device: str) -> Workload:
    workload.batch = tuple(t.to(device) for t in workload.batch)  # type: ignore[assignment]
    return workload


# --- (2) products ---


def _products(device: str, scale: Scale) -> Iterator[Case]:
    for n in scale.widths:
        for rows in scale.rows:
            for name in scale.dtypes:
                dense: dict[str, float] = {}
                for rate in _RATES:
                    what = {"width": n, "rows": rows, "dtype": name, "rate": rate}
                    yield what, partial(_product, n, rows, name, rate, dense, device, scale)


def _product(
    n: int, rows: int, name: str, rate: float, dense: dict[str, float], device: str, scale: Scale
) -> Row:  # fmt: skip
    """Forward product and both gradients; the dense ones are timed once for all rates."""
    dtype = _type(name)
    x, dy, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, n), (rows, n), (n, n)))
    if not dense:
        dense["ms"] = 1e3 * _seconds(lambda: (x @ weight.t(), dy @ weight, dy.t() @ x), device, scale)
    groups, share = _PATTERNS[rate]
    kept = round(n // _BLOCK * share) * _BLOCK
    # Packed activations as a layer before makes them: [groups, rows, kept], rows of a group contiguous.
    packed, d_packed = (torch.randn(groups, rows // groups, kept, device=device).to(dtype) for _ in range(2))
    part = torch.randn(groups, kept, kept, device=device).to(dtype)

    def both_sides() -> Any:
        return torch.bmm(packed, part.mT), torch.bmm(d_packed, part), torch.bmm(d_packed.mT, packed)

    # One side: rows of a group are every groups-th row of a dense tensor.
    strided = x[: rows - rows % groups].view(-1, groups, n).transpose(0, 1)
    wide = torch.randn(groups, kept, n, device=device).to(dtype)

    def outputs_only() -> Any:
        return torch.bmm(strided, wide.mT), torch.bmm(d_packed, wide), torch.bmm(d_packed.mT, strided)

    both, one = (1e3 * _seconds(run, device, scale) for run in (both_sides, outputs_only))
    saved = groups * (rows // groups) * kept * kept / (rows * n * n)
    return {
        "mm_ms": dense["ms"],
        "bmm_both_sides_ms": both,
        "bmm_outputs_ms": one,
        "times_as_fast": dense["ms"] / both,
        "ideal": 1 / saved,
        "mm_tflops": 6e-9 * rows * n * n / dense["ms"],
        "bmm_tflops": 6e-9 * rows * n * n * saved / both,
    }


# --- (3) pack and unpack ---


def _copies(device: str, scale: Scale) -> Iterator[Case]:
    peak: dict[str, float] = {}
    for n in scale.widths:
        for name in ("bf16", "fp32") if device == "cuda" else ("fp32",):
            for rate in _RATES:
                for what in ("weight", "activations"):
                    case = {"what": what, "width": n, "dtype": name, "rate": rate}
                    yield case, partial(_copy, what, n, name, rate, peak, device, scale)


def _copy(what: str, n: int, name: str, rate: float, peak: dict[str, float], device: str, scale: Scale) -> Row:
    dtype = _type(name)
    if not peak:
        large = torch.empty(2**29 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
        other = torch.empty_like(large)
        peak["gb_s"] = 2e-9 * large.numel() / _seconds(lambda: other.copy_(large), device, scale)
    m = n
    tables = _tables(n, n, rate, device)
    if what == "activations":
        groups = len(tables[0])
        m = scale.rows[0] - scale.rows[0] % groups
        of_group = torch.arange(m, device=device, dtype=torch.int32).view(-1, groups).t().contiguous()
        layers = len(tables[3])
        tables = (of_group, tables[1], reference.slots(of_group, m, layers), tables[3])
    dense = torch.randn(m, n, device=device).to(dtype)
    packed = pack_ops.pack(dense, *tables, _BLOCK)
    moved = packed.numel() * dtype.itemsize
    packing = _seconds(lambda: pack_ops.pack(dense, *tables, _BLOCK), device, scale)
    unpacking = _seconds(lambda: pack_ops.unpack(packed, *tables, m, n, _BLOCK), device, scale)
    pack_gb, unpack_gb = 2e-9 * moved / packing, 1e-9 * (moved + dense.numel() * dtype.itemsize) / unpacking
    return {
        "pack_us": 1e6 * packing,
        "unpack_us": 1e6 * unpacking,
        "pack_gb_s": pack_gb,
        "unpack_gb_s": unpack_gb,
        "copy_gb_s": peak["gb_s"],
        "pack_of_copy": pack_gb / peak["gb_s"],
        "unpack_of_copy": unpack_gb / peak["gb_s"],
    }


# --- (4) and (5) whole steps ---


class FeedForward(nn.Module):
    """The feed-forward half of a transformer layer, with its residual sum and norm, on ``[tokens, d]``."""

    def __init__(self, d: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(d, hidden), nn.GELU(), nn.Dropout(rate), nn.Linear(hidden, d), nn.Dropout(rate)
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[tokens, d]`` to ``[tokens, 10]``."""
        return self.head(self.norm(x + self.net(x)))


def _feed_forward(d: int, hidden: int, tokens: int) -> Workload:
    make = partial(FeedForward, d, hidden)
    batch = torch.randn(tokens, d), torch.randint(10, (tokens,))
    return Workload(f"feed-forward {d}-{hidden}, {tokens} tokens", make, make, batch)


def _workloads(device: str) -> list[tuple[str, Callable[[], Workload]]]:
    """What is trained, by type, in the order of interest."""
    mlp, lstm, sign = workloads.mlp, workloads.lstm, workloads.sign
    if device != "cuda":
        return [
            ("fp32", partial(mlp, [20, 64, 64, 10], 32)),
            ("fp32", partial(sign, 32, 40, 8, 3, 10)),
            ("fp32", partial(lstm, 32, 2, 4, 3, 50)),
        ]
    return [
        ("bf16", partial(mlp, [784, 4096, 4096, 10], 16384)),
        ("bf16", partial(_feed_forward, 1024, 4096, 16384)),
        ("bf16", partial(mlp, [784, 4096, 4096, 10], 4096)),
        ("fp32", partial(mlp, [784, 2048, 2048, 10], 16384)),
        ("fp32", partial(sign, 512, 50_000)),
        ("fp32", partial(lstm, 650, 2, 35, 20, 10_000)),
        ("fp32", partial(lstm, 1500, 2, 35, 20, 10_000)),
        ("bf16", partial(mlp, [784, 2048, 2048, 10], 16384)),
        ("fp32", partial(mlp, [784, 4096, 4096, 10], 16384)),
        ("bf16", partial(mlp, [784, 4096, 4096, 10], 65536)),
        ("fp32", partial(mlp, [784, 2048, 2048, 10], 128)),
        ("bf16", partial(mlp, [784, 2048, 2048, 10], 4096)),
        ("bf16", partial(_feed_forward, 1024, 4096, 8192)),
    ]


@dataclass
class _Known:
    """What the cases of one workload have in common: times of conventional dropout, and a compiled step."""

    milliseconds: dict[str, float]
    step: contenders.Step | None = None


def _steps(device: str, scale: Scale) -> Iterator[Case]:
    every = [(name, make, _Known({})) for name, make in _workloads(device)]
    for rate in _RATES:
        for name, make, known in every:
            # What conventional dropout costs does not depend on the rate.
            for contender in ("row",) if rate != _RATES[0] else ("conventional", "row"):
                for mode in ("compiled", "graphed", "eager") if rate == _RATES[0] else ("compiled", "graphed"):
                    what = {"workload": make().name, "dtype": name, "rate": rate}
                    what |= {"contender": contender, "mode": mode}
                    yield what, partial(_step, make, name, rate, contender, mode, known, device, scale)


def _new_step(make: Callable[[], Workload], name: str, rate: float, contender: str, device: str) -> contenders.Step:
    torch.manual_seed(0)
    dtype = _type(name)
    workload = _on(make(), device)
    if workload.batch[0].is_floating_point():
        workload.batch = (workload.batch[0].to(dtype), workload.batch[1])
    # All that can be skipped is: from what it gains follows what the policy should leave alone.
    options: dict[str, Any] = {"min_gain": 0} if contender == "row" else {}
    torch.set_default_dtype(dtype)
    try:
        return contenders.contender(workload, contender, rate, **options)
    finally:
        torch.set_default_dtype(torch.float32)


def _step(
    make: Callable[[], Workload], name: str, rate: float, contender: str, mode: str, known: _Known,
    device: str, scale: Scale,
) -> Row:  # fmt: skip
    """A step's time, what of it is the host's, and the gain over conventional dropout."""
    if mode == "graphed" and device != "cuda":
        return {"note": "only with a GPU"}
    if mode == "graphed" and known.step is not None:
        step = known.step
        _type(name)
    else:
        step = _new_step(make, name, rate, contender, device)
        if mode != "eager":
            torch.compiler.reset()  # lest the limit of recompilations of one class be reached
            step.compile(scale.backend)
    known.step = step if mode == "compiled" else None
    run: Callable[[], Any] = step
    graphs = None
    if mode == "graphed":
        graphs = StepGraphs(CudaCapture(), max_graphs=32)
        run = partial(_graphed, step, graphs)
    for _ in range(20 if mode == "graphed" else 5):
        run()
    count = _count(run, device, scale)
    times = []
    for _ in range(scale.rounds):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        _synchronize(device)
        times.append((time.perf_counter() - start) / count)
    milliseconds = 1e3 * statistics.median(times)
    if contender == "conventional":
        known.milliseconds[mode] = milliseconds
    fastest = min(known.milliseconds.values(), default=None)
    same = known.milliseconds.get(mode)
    return {
        "ms": milliseconds,
        "host_ms": _host_milliseconds(run),
        "to_same_mode": same / milliseconds if same else None,
        "to_fastest": fastest / milliseconds if fastest else None,
        "ceiling": 1 / (1 - step.report.saved) if step.report is not None else None,
        "note": str(graphs.counts).replace("\n", ";") if graphs is not None and graphs.counts.eager else "",
    }


def _graphed(step: contenders.Step, graphs: StepGraphs) -> Any:
    """A step whose patterns are drawn before, and all else is replayed."""
    step.draw()
    key = None if step.report is None else replay_key(step.model)

    def after_draw(_inputs: Sequence[Tensor]) -> Tensor:
        loss = step.after_draw()
        if step.report is not None and torch.cuda.is_current_stream_capturing():
            check_replayable(step.model)
        return loss

    return graphs.run(key, [], after_draw)


def _host_milliseconds(run: Callable[[], Any]) -> float:
    """Until a step has been launched, with nothing queued before it: a full queue would hold the host up."""
    times = []
    for _ in range(5):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


#: Name, title, share of the time, cases.
PARTS: tuple[tuple[str, str, float, Callable[[str, Scale], Iterator[Case]]], ...] = (
    ("correctness", "1. Correctness", 0.12, _correctness),
    ("products", "2. mm against strided bmm, forward and both gradients", 0.1, _products),
    ("copies", "3. Pack and unpack", 0.04, _copies),
    ("steps", "4 and 5. Whole steps, and the host's share", 0.74, _steps),
)
