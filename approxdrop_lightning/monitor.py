"""Throughput of the training steps, in samples and tokens per second."""

import dataclasses
import math
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from time import perf_counter
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch._dynamo.utils import counters


class ThroughputLogger(Callback):
    """Measure the throughput of training steps alone, without data loading, validation and warm-up.

    The clock runs from ``on_train_batch_start`` to ``on_train_batch_end``. Place this callback *before*
    :class:`ApproxDropout`, so that drawing the patterns is included. Lightning's own ``ThroughputMonitor`` includes
    the time between steps, so that data loading hides the gain. On an accelerator, each step starts and ends with a
    synchronization; otherwise the clock would measure how fast kernels are queued.

    Logged at the Trainer's logging interval, per device, averaged over the last ``window_size`` steps:
    ``throughput/samples_per_sec`` and, with ``unit="tokens"``, ``throughput/tokens_per_sec``. The means over
    all measured steps of the last fit are in :attr:`summary`.

    A batch may be a tensor or an array, or tuples, lists, mappings and dataclasses of them, mixed with anything else.
    Items without ``batch_dim`` (a scalar, a string) are ignored, and in a list of strings each one is a sample. Steps
    of a batch in which nothing can be counted are not measured, with a warning for the first one.

    Steps in which ``torch.compile`` compiles a graph are not measured either, even late ones: a model has several
    graphs, and some are rarely needed.

    Args:
        unit: the unit to count. ``"samples"``: the size of the first tensor's ``batch_dim``. ``"tokens"``: also the
            elements of the last tensor (the targets).
        batch_dim: the batch dimension; 1 for time-major text ``[T, B]``.
        warmup_steps: number of steps at the start of a fit to ignore (memory allocation, autotuning, compilation).
        window_size: number of steps over which the logged rates are averaged; at least 2.

    Raises:
        MisconfigurationException: for an unknown unit, a negative warm-up or a window below 2.

    Example:
        >>> throughput = ThroughputLogger(unit="tokens", batch_dim=1)
        >>> trainer = Trainer(callbacks=[throughput])  # then trainer.fit(...), throughput.summary
    """

    _seen: int
    _steps: int
    _samples: int
    _tokens: int
    _seconds: float
    _started: float
    _graphs: int

    def __init__(
        self,
        unit: Literal["samples", "tokens"] = "samples",
        batch_dim: int = 0,
        warmup_steps: int = 10,
        window_size: int = 20,
    ) -> None:
        super().__init__()
        if unit not in ("samples", "tokens"):
            raise MisconfigurationException(f"unit must be 'samples' or 'tokens', got {unit!r}")
        if warmup_steps < 0:
            raise MisconfigurationException(f"warmup_steps must not be negative, got {warmup_steps}")
        if window_size < 2:
            raise MisconfigurationException(f"window_size must be at least 2, got {window_size}")
        self.unit = unit
        self.batch_dim = batch_dim
        self.warmup_steps = warmup_steps
        self._window_size = window_size
        self._window: deque[tuple[float, int, int]] = deque(maxlen=window_size)
        self._warned = False
        self._reset()

    @property
    def summary(self) -> dict[str, float]:
        """Mean rates per device over the measured steps of the last fit; empty if there were none.

        Keys: ``samples_per_sec``, ``tokens_per_sec`` (with ``unit="tokens"``), ``steps``, ``seconds``.
        """
        if not self._seconds:
            return {}
        rates = {"samples_per_sec": self._samples / self._seconds}
        if self.unit == "tokens":
            rates["tokens_per_sec"] = self._tokens / self._seconds
        return rates | {"steps": self._steps, "seconds": self._seconds}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the measurements; each fit has its own warm-up."""
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        _wait_for(trainer.strategy.root_device)
        self._graphs = _compiled_graphs()
        self._started = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, count the batch, and log."""
        _wait_for(trainer.strategy.root_device)
        elapsed = perf_counter() - self._started
        self._seen += 1
        if self._seen <= self.warmup_steps or _compiled_graphs() != self._graphs:
            return
        counted = _count(batch, self.batch_dim)
        if counted is None:
            self._warn(batch)
            return
        self._seconds += elapsed
        self._steps += 1
        self._samples += counted[0]
        self._tokens += counted[1]
        self._window.append((self._seconds, self._samples, self._tokens))
        # The Trainer's logger connector sets this attribute, which type checkers do not see.
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        """Log the rates of the window, as soon as it is full."""
        if len(self._window) < self._window_size:
            return
        seconds, samples, tokens = (
            last - first for first, last in zip(self._window[0], self._window[-1], strict=True)
        )
        if seconds <= 0:  # the clock is too coarse
            return
        pl_module.log("throughput/samples_per_sec", samples / seconds, batch_size=1)
        if self.unit == "tokens":
            pl_module.log("throughput/tokens_per_sec", tokens / seconds, batch_size=1)

    def _warn(self, batch: Any) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"ThroughputLogger: nothing in a batch of the type {type(batch).__name__} has a dimension "
                f"batch_dim={self.batch_dim} to count samples by; such steps are not measured",
                stacklevel=2,
            )

    def _reset(self) -> None:
        self._window.clear()
        self._seen = self._steps = self._samples = self._tokens = 0
        self._seconds = self._started = 0.0
        self._graphs = 0


def _compiled_graphs() -> int:
    """Number of graphs that ``torch.compile`` has compiled so far in this process."""
    return counters["stats"]["unique_graphs"]


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _count(batch: Any, batch_dim: int) -> tuple[int, int] | None:
    """Number of samples in a batch, and of elements in its last tensor; None if nothing can be counted."""
    shapes = [shape for shape in _shapes(batch) if -len(shape) <= batch_dim < len(shape)]
    if not shapes:
        return None
    return shapes[0][batch_dim], math.prod(shapes[-1])


def _shapes(x: Any, within: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Shapes of the tensors and arrays in a batch, in order; a list of strings counts by its length.

    Args:
        x: The batch, or a part of it.
        within: Identities of the containers it is in; one that contains itself is entered once.
    """
    if id(x) in within:
        return
    try:
        shape = getattr(x, "shape", None)
    except RuntimeError:  # a nested tensor of the strided layout has none
        return
    within = (*within, id(x))
    if isinstance(shape, tuple):
        if all(isinstance(size, int) for size in shape):  # sizes of nested tensors may be symbolic
            yield shape
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        for field in dataclasses.fields(x):
            yield from _shapes(getattr(x, field.name, None), within)
    elif isinstance(x, Mapping):
        for value in x.values():
            yield from _shapes(value, within)
    elif isinstance(x, list | tuple):
        if x and all(isinstance(value, str | bytes) for value in x):
            yield (len(x),)
        for value in x:
            yield from _shapes(value, within)
