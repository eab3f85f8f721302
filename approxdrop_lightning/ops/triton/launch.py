"""Kernel launches as objects, and helpers for alignment and precision."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with everything needed to launch it.

    Attributes:
        kernel: A ``triton.jit`` function, possibly wrapped by ``triton.autotune``.
        grid: Maps the compile-time constants of a configuration to the number of programs along each axis.
        arguments: Tensors and numbers, by name.
        constants: Compile-time constants that are not tuned.
        options: Launch options such as ``num_warps``, for kernels that are not tuned.
    """

    kernel: Any
    grid: Callable[[dict[str, Any]], tuple[int, ...]]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launch the kernel, unless the grid is empty.

        An autotuned kernel that has not been timed for such arguments runs its first configuration untimed in the
        interpreter, during CUDA graph capture (which timing would break), and with ``APPROXDROP_AUTOTUNE=0``.
        """
        best = self.kernel.cache.get(self.tuning_key()) if hasattr(self.kernel, "configs") else None
        tuned = [best] if best is not None else self.configurations()
        if 0 in self.grid(tuned[0].kwargs if tuned else {}):
            return
        kernel, options = self.kernel, self.options
        if tuned and (best is not None or not self._may_time()):
            kernel, options = kernel.fn, tuned[0].all_kwargs()
        kernel[self.grid](**self.arguments, **self.constants, **options)

    def tuning_key(self) -> tuple[Any, ...]:
        """Key in the cache of ``triton.autotune``: the values of its key arguments, and the types of all tensors."""
        call = {k: v for k, v in (self.arguments | self.constants).items() if k in self.kernel.arg_names}
        named = [call[name] for name in self.kernel.keys if name in call]
        return (*named, *(str(value.dtype) for value in call.values() if hasattr(value, "dtype")))

    def configurations(self) -> list[triton.Config]:
        """Configurations that autotuning tries for these arguments, default first; empty if nothing is tuned."""
        every = getattr(self.kernel, "configs", [])
        prune = getattr(self.kernel, "early_config_prune", None)
        return list(prune(every, {}, **self.arguments, **self.constants) if prune else every)

    def _may_time(self) -> bool:
        if os.environ.get("APPROXDROP_AUTOTUNE", "1") == "0":
            return False
        on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in self.arguments.values())
        return on_gpu and not torch.cuda.is_current_stream_capturing()


@triton.jit  # type: ignore[untyped-decorator]
def whole(number: tl.tensor, RUN: tl.constexpr) -> tl.tensor:
    """Mark a number as a multiple of RUN; a hint on a loaded scalar does not survive the compiler's first pass."""
    return number // RUN * RUN


def precision(dtype: torch.dtype) -> str:
    """Input precision of products of a type: tf32 only if PyTorch's own products use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def aligned_run(itemsize: int, *numbers: int) -> int:
    """Elements per 16-byte load if all offsets that are multiples of ``numbers`` are aligned to it; otherwise 1."""
    widest = 16 // itemsize
    return widest if all(number % widest == 0 for number in numbers) else 1
