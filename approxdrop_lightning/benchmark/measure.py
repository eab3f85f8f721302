"""Time and memory measurements of steps that alternate in one process."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from statistics import quantiles

import torch
from torch.profiler import ProfilerActivity, profile

from approxdrop_lightning.ops.native.buffers import free_buffers

Step = Callable[[], None]


def interleaved(
    steps: Mapping[str, Step], repeats: int, warmup: int = 2, consecutive: int = 1
) -> dict[str, list[float]]:
    """Time several contenders in alternating rounds, so that noise affects all of them equally.

    In each round a contender runs once untimed, because the others have evicted its data from the caches, and then
    ``consecutive`` steps in a row, as in training.

    Args:
        steps: The functions to time, by name.
        repeats: Number of timed rounds, >= 1.
        warmup: Number of untimed rounds before them.
        consecutive: Steps timed per round, >= 1.

    Returns:
        For each name the seconds per step in each round, averaged over the consecutive steps.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warmup + repeats):
        for name, step in steps.items():
            step()
            _synchronize()
            start = time.perf_counter()
            for _ in range(consecutive):
                step()
            _synchronize()
            if index >= warmup:
                seconds[name].append((time.perf_counter() - start) / consecutive)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # a GPU may be present without being measured
        torch.cuda.synchronize()


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    first, median, third = quantiles(values * 2 if len(values) == 1 else values, n=4, method="inclusive")
    return first, median, third


def ratio(baseline: list[float], other: list[float]) -> float:
    """Speed-up of ``other`` over ``baseline``: the median over rounds of the ratio of their times."""
    return quartiles([a / b for a, b in zip(baseline, other, strict=True)])[1]


def peak_memory(step: Step) -> float:
    """Peak memory that a step allocates on top of what was allocated before, in MB (2^20 bytes).

    This covers activations, temporaries and gradients. Do not measure the first step, which allocates the optimizer's
    state, and free the gradients beforehand, so that they count for every contender. Pooled buffers are freed here,
    for the same reason.
    """
    gc.collect()
    free_buffers()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0)) / 2**20


def where_time_goes(step: Step, rows: int = 14) -> str:
    """Profile a step: table of the operators that take most of its time, sorted by self time."""
    step()
    _synchronize()
    on_gpu = torch.cuda.is_initialized()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as recorded:
        for _ in range(3):
            step()
        _synchronize()
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return recorded.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=44)


def surroundings(device: str) -> dict[str, str]:
    """The hardware and software that a measurement was made with."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
