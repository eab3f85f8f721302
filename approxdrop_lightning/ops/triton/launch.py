"""What the row kernels have in common: a launch as a value, the end of a product, the choice of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel and all that it is launched with.

    Attributes:
        kernel: The kernel.
        grid: Programs along each axis.
        arguments: Tensors, descriptors and numbers.
        constants: Compile-time constants.
        num_warps: Warps of a program.
        num_stages: Tiles in flight.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def run(self) -> None:
        """Launch it, if there is anything to do."""
        if 0 not in self.grid:
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


@triton.jit
def whole(number, RUN: tl.constexpr):
    """The number, known to be a multiple: a hint on a loaded scalar does not outlive the compiler's first pass."""
    return number // RUN * RUN


@triton.jit
def finish(pre, y, z, at, live, ACTIVATION: tl.constexpr):
    """``y = act(pre)``; what its derivative needs beside ``y`` goes to ``z``: for GELU its argument."""
    if ACTIVATION == "relu":
        value = tl.maximum(pre, 0.0)
    elif ACTIVATION == "gelu":
        tl.store(z + at, pre.to(z.dtype.element_ty), mask=live)
        value = 0.5 * pre * (1.0 + tl.erf(pre * 0.7071067811865476))
    else:
        value = pre
    tl.store(y + at, value.to(y.dtype.element_ty), mask=live)


def precision(dtype: torch.dtype) -> str:
    """How products of a type are rounded: tf32 only where PyTorch's own are."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def aligned_run(itemsize: int, *numbers: int) -> int:
    """Elements of a load of 16 bytes if it is aligned wherever a multiple of ``numbers`` leads; else 1."""
    widest = 16 // itemsize
    return widest if all(number % widest == 0 for number in numbers) else 1


def saved_for(activation: str, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """What the derivative is computed from."""
    return {"identity": (), "relu": (y,), "gelu": (z,)}[activation]


def before_activation(activation: str, dy: Tensor, *values: Tensor) -> Tensor:
    """Gradient of the argument of the activation."""
    if activation == "relu":
        dy = dy * (values[0] > 0)
    elif activation == "gelu":
        dy = torch.ops.aten.gelu_backward(dy, values[0])
    return dy.contiguous()
