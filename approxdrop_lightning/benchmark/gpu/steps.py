"""Parts 4 and 5: whole steps, and what of them is the host's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from approxdrop_lightning.benchmark import contenders, workloads
from approxdrop_lightning.benchmark.gpu.measuring import (
    RATES,
    Case,
    Row,
    Scale,
    calls_of_a_round,
    dtype_of,
    on_device,
    synchronize,
)
from approxdrop_lightning.benchmark.workloads import Workload
from approxdrop_lightning.conversion import check_replayable, replay_key
from approxdrop_lightning.step_graphs import CudaCapture, StepGraphs


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


def cases(device: str, scale: Scale) -> Iterator[Case]:
    """Cases of parts 4 and 5."""
    every = [(name, make, _Known({})) for name, make in _workloads(device)]
    for rate in RATES:
        for name, make, known in every:
            # What conventional dropout costs does not depend on the rate.
            for contender in ("row",) if rate != RATES[0] else ("conventional", "row"):
                for mode in ("compiled", "graphed", "eager") if rate == RATES[0] else ("compiled", "graphed"):
                    what = {"workload": make().name, "dtype": name, "rate": rate}
                    what |= {"contender": contender, "mode": mode}
                    yield what, partial(_step, make, name, rate, contender, mode, known, device, scale)


def _new_step(make: Callable[[], Workload], name: str, rate: float, contender: str, device: str) -> contenders.Step:
    torch.manual_seed(0)
    dtype = dtype_of(name)
    workload = on_device(make(), device)
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
        dtype_of(name)
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
    count = calls_of_a_round(run, device, scale)
    times = []
    for _ in range(scale.rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        synchronize(device)
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
