"""Whole training steps as CUDA graphs: forward, backward and optimizer in a single launch.

Steps of a few milliseconds are bound by the host, which launches hundreds of kernels. A captured step replays them
all at once. It always reads the same memory, so batches are copied into the tensors that it was captured with.
Nothing in it may depend on Python: each combination of shapes and of anything else that changes the code, such as
``(dp, keep)`` of the patterns, is a *key* with its own graph.

Only the capture itself waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from approxdrop_lightning.policy import REPLAYED

Step = Callable[[Sequence[Tensor]], Any]


class Capture(Protocol):
    """Captures steps: :class:`CudaCapture`, except in tests."""

    @property
    def recording(self) -> bool:
        """Whether a capture is under way."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Run eagerly and return the result."""

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record without running; return the result, and a function that replays into its tensors."""


class CudaCapture:
    """Captures with ``torch.cuda.CUDAGraph``. Steps never overlap, so all graphs share a memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    @property
    def recording(self) -> bool:
        """As in :class:`Capture`."""
        return torch.cuda.is_current_stream_capturing()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Run on the stream of the captures, because autograd remembers streams."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        return result

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """As in :class:`Capture`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = run()
        self._pool = graph.pool()
        return result, graph.replay


@dataclass
class _Captured:
    inputs: list[Tensor]
    result: Any
    replay: Callable[[], None]


@dataclass
class StepCounts:
    """Numbers of steps.

    Attributes:
        replayed: Steps that were replayed.
        warmed_up: Eager steps before a capture, in which code is compiled and tuned, and memory allocated.
        eager: All other eager steps.
        reasons: Number of them by reason.
    """

    replayed: int = 0
    warmed_up: int = 0
    eager: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        text = f"{self.replayed} steps replayed, {self.warmed_up} to warm up, {self.eager} eager"
        return text + "".join(f"\n  {count} eager: {reason}" for reason, count in self.reasons.most_common())


class StepGraphs:
    """Runs steps as captured graphs where possible, and eagerly otherwise.

    Args:
        capture: Captures the steps.
        warmup: Eager steps before a key is captured, >= 1, because the state of the optimizer must exist.
        max_graphs: Maximum number of graphs; steps with further keys run eagerly.
    """

    def __init__(self, capture: Capture, warmup: int = 3, max_graphs: int = 16) -> None:
        if warmup < 1:
            raise ValueError(f"StepGraphs: warmup must be at least 1, got {warmup}")
        if max_graphs < 1:
            raise ValueError(f"StepGraphs: max_graphs must be at least 1, got {max_graphs}")
        self.counts = StepCounts()
        self._capture, self._warmup, self._max_graphs = capture, warmup, max_graphs
        self._seen: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, _Captured] = {}
        self._refused: dict[Hashable, str] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, inputs: Sequence[Tensor], step: Step) -> Any:
        """Run one step.

        Args:
            key: What the code of the step depends on, besides the shapes of its inputs.
            inputs: Tensors on the device that change from step to step.
            step: Computes the step from such tensors, for eager steps and for captures. The tensors that it returns,
                in any nesting, are overwritten by the next replay.

        Returns:
            What the step returns.
        """
        key = (key, tuple((t.shape, t.dtype, t.device) for t in inputs))
        if key in self._graphs:
            return self._replay(self._graphs[key], inputs)
        token = REPLAYED.set(True)  # for the policy: the host time of what is compiled now will not count
        try:
            return self._first(key, inputs, step)
        finally:
            REPLAYED.reset(token)

    def _first(self, key: Hashable, inputs: Sequence[Tensor], step: Step) -> Any:
        """Run a step that has no graph yet."""
        if key in self._refused:
            return self._eager(inputs, step, self._refused[key])
        self._seen[key] += 1
        if self._seen[key] <= self._warmup:
            self.counts.warmed_up += 1
            return self._capture.warm_up(lambda: step(inputs))
        if len(self._graphs) >= self._max_graphs:
            return self._eager(inputs, step, f"more than {self._max_graphs} combinations of shapes and settings")
        static = [t.clone() for t in inputs]
        try:
            result, replay = self._capture.capture(lambda: step(static))
        except Exception as error:
            # Anything that cannot be captured, such as reading a value on the host.
            self._refused[key] = f"the capture failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            return self._eager(inputs, step, self._refused[key])
        self._graphs[key] = _Captured(static, result, replay)
        return self._replay(self._graphs[key], inputs)

    def _replay(self, captured: _Captured, inputs: Sequence[Tensor]) -> Any:
        for static, given in zip(captured.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        captured.replay()
        self.counts.replayed += 1
        return captured.result

    def _eager(self, inputs: Sequence[Tensor], step: Step, reason: str) -> Any:
        self.count_eager(reason)
        return step(inputs)

    def count_eager(self, reason: str) -> None:
        """Count a step that ran eagerly."""
        self.counts.eager += 1
        self.counts.reasons[reason] += 1


def split_tensors(batch: Any) -> tuple[list[Tensor], Hashable, Callable[[Sequence[Tensor]], Any]]:
    """Split a batch into its tensors, the rest (for a key), and a function that reassembles it from tensors.

    Raises:
        TypeError: The batch contains an object other than a tensor that is not hashable.
    """
    leaves, spec = tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    hash(others)

    def put(given: Sequence[Tensor]) -> Any:
        remaining = iter(given)
        filled = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tree_unflatten(filled, spec)

    return tensors, (str(spec), others), put
