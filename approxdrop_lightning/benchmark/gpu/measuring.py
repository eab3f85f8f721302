"""How the parts measure: sizes by device, time without the host, types and patterns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.benchmark.workloads import Workload
from approxdrop_lightning.ops.pack import reference
from approxdrop_lightning.step_graphs import CudaCapture

Row = dict[str, Any]
Case = tuple[Row, Callable[[], Row]]
#: (groups, share of the units that each keeps) of the default distribution's main pair, by rate.
PATTERNS = {0.3: (2, 0.7), 0.5: (2, 0.5), 0.7: (3, 0.3)}
RATES = (0.5, 0.7, 0.3)
BLOCK = 16


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


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], device: str, scale: Scale) -> float:
    """Seconds of a call, without the host: as a replayed graph of several calls where there is a GPU."""
    count = calls_of_a_round(run, device, scale)
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
        synchronize(device)
        start = time.perf_counter()
        repeat()
        synchronize(device)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def calls_of_a_round(run: Callable[[], Any], device: str, scale: Scale) -> int:
    """How many calls fill a round; the first ones compile and choose."""
    run()
    run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return max(1, min(20, int(scale.seconds / (time.perf_counter() - start))))


def dtype_of(name: str) -> torch.dtype:
    """The type of a name; ``"tf32"`` is float32 with tf32 products, which are switched on or off here."""
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


def kept_units(n: int, rate: float, device: str) -> Tensor:
    """``[groups, kept units]``: whole blocks in random order, as the default pattern has them."""
    groups, share = PATTERNS[rate]
    blocks = n // BLOCK
    kept = round(blocks * share)
    order = torch.randperm(blocks)
    shift = min(kept, (blocks - kept) // max(1, groups - 1))  # overlapping where more than half are kept
    chosen = torch.stack([order[g * shift : g * shift + kept] for g in range(groups)])
    units = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK)).view(groups, -1)
    return units.to(device=device, dtype=torch.int32)


def pattern_tables(n_rows: int, n_columns: int, rate: float, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tables of a weight of which outputs and inputs are dropped, and their inverse."""
    rows, columns = kept_units(n_rows, rate, device), kept_units(n_columns, rate, device)
    layers = len(rows) if rate < 0.5 else 1
    return rows, columns, reference.slots(rows, n_rows, layers), reference.slots(columns, n_columns, layers)


def on_device(workload: Workload, device: str) -> Workload:
    """Move the batch of a workload."""
    workload.batch = tuple(t.to(device) for t in workload.batch)  # type: ignore[assignment]
    return workload
