"""How fast the training steps run: samples and tokens per second."""

from time import perf_counter
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.throughput import Throughput
from torch import Tensor
from torch.utils._pytree import tree_leaves


class ThroughputLogger(Callback):
    """Measure training steps only: no data loading, no validation, no warm-up.

    The clock runs from ``on_train_batch_start`` to ``on_train_batch_end``. Place this callback *before*
    :class:`ApproxDropout`, so that drawing the patterns counts as work. Lightning's own
    ``ThroughputMonitor`` lets the clock run between the steps too, which hides the gain behind the loader.
    On an accelerator the device is waited for at the start and the end of each step: without that the clock
    measures how fast kernels are queued.

    Logged at the Trainer's logging interval, per device, averaged over the last ``window_size`` steps:
    ``throughput/samples_per_sec`` and, with ``unit="tokens"``, ``throughput/tokens_per_sec``. The means over
    all measured steps of the last fit are in :attr:`summary`.

    Args:
        unit: what an item of a batch is. ``"samples"``: counted by the size of the first tensor's
            ``batch_dim``. ``"tokens"``: the elements of the last tensor (the targets) are counted as well.
        batch_dim: the dimension that counts samples; 1 for time-major text ``[T, B]``.
        warmup_steps: how many first steps of a fit do not count (memory allocation, autotuning, compilation).
        window_size: how many steps the logged rates average over; at least 2.

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
        self._throughput = Throughput(window_size=window_size)
        self._reset()

    @property
    def summary(self) -> dict[str, float]:
        """Mean rates per device over the measured steps of the last fit; empty if there were none.

        Keys: ``samples_per_sec``, ``tokens_per_sec`` (with ``unit="tokens"``), ``steps``, ``seconds``.
        """
        if not self._steps:
            return {}
        rates = {"samples_per_sec": self._samples / self._seconds}
        if self.unit == "tokens":
            rates["tokens_per_sec"] = self._tokens / self._seconds
        return rates | {"steps": self._steps, "seconds": self._seconds}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the fit before: each warms up anew."""
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        _wait_for(trainer.strategy.root_device)
        self._started = perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, count the batch, log."""
        _wait_for(trainer.strategy.root_device)
        elapsed = perf_counter() - self._started
        self._seen += 1
        if self._seen <= self.warmup_steps:
            return
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        self._seconds += elapsed
        self._steps += 1
        self._samples += tensors[0].size(self.batch_dim)
        tokens = None
        if self.unit == "tokens":
            tokens = self._tokens = self._tokens + tensors[-1].numel()
        self._throughput.update(time=self._seconds, batches=self._steps, samples=self._samples, lengths=tokens)
        # The Trainer's logger connector sets the attribute, unseen by type checkers.
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        """Log the rates of the window, as soon as it is full."""
        rates = self._throughput.compute()
        for name, key in (("samples", "device/samples_per_sec"), ("tokens", "device/items_per_sec")):
            if key in rates:
                pl_module.log(f"throughput/{name}_per_sec", rates[key], batch_size=1)

    def _reset(self) -> None:
        self._throughput.reset()
        self._seen = self._steps = self._samples = self._tokens = 0
        self._seconds = self._started = 0.0


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
