"""A launch as a value, and what kernels are told about alignment and precision."""

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
    """A kernel and all that it is launched with.

    Attributes:
        kernel: A ``triton.jit`` function, or the ``triton.autotune`` of one.
        grid: Programs along each axis, of the compile-time constants of a configuration.
        arguments: Tensors and numbers, by name.
        constants: Compile-time constants that are not tuned.
        options: Launch options such as ``num_warps``, if nothing is tuned.
    """

    kernel: Any
    grid: Callable[[dict[str, Any]], tuple[int, ...]]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launch it, if there is anything to do.

        An autotuned kernel that was not timed yet for such arguments takes its first configuration in the
        interpreter, while a CUDA graph is captured (which timing would break), and with ``APPROXDROP_AUTOTUNE=0``.
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
        """The key of ``triton.autotune``'s cache: its arguments of that name, and the types of all tensors."""
        call = {k: v for k, v in (self.arguments | self.constants).items() if k in self.kernel.arg_names}
        named = [call[name] for name in self.kernel.keys if name in call]
        return (*named, *(str(value.dtype) for value in call.values() if hasattr(value, "dtype")))

    def configurations(self) -> list[triton.Config]:
        """What autotuning tries for these arguments, the one to take untimed first; empty if nothing is tuned."""
        every = getattr(self.kernel, "configs", [])
        prune = getattr(self.kernel, "early_config_prune", None)
        return list(prune(every, {}, **self.arguments, **self.constants) if prune else every)

    def _may_time(self) -> bool:
        if os.environ.get("APPROXDROP_AUTOTUNE", "1") == "0":
            return False
        on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in self.arguments.values())
        return on_gpu and not torch.cuda.is_current_stream_capturing()


@triton.jit
def whole(number, RUN: tl.constexpr):
    """The number, known to be a multiple: a hint on a loaded scalar does not outlive the compiler's first pass."""
    return number // RUN * RUN


def precision(dtype: torch.dtype) -> str:
    """How products of a type are rounded: tf32 only where PyTorch's own are."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def aligned_run(itemsize: int, *numbers: int) -> int:
    """Elements of a load of 16 bytes if it is aligned wherever a multiple of ``numbers`` leads; else 1."""
    widest = 16 // itemsize
    return widest if all(number % widest == 0 for number in numbers) else 1
