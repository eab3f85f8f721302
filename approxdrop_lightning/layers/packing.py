"""How kept values stand for a dense tensor."""

from __future__ import annotations

from torch import Tensor

from approxdrop_lightning import functional
from approxdrop_lightning.patterns.row import RowPattern

#: Pattern, the leading shape by which it groups rows, and the shape of the dense tensor.
Packing = tuple[RowPattern, tuple[int, ...], tuple[int, ...]]


def unpacked(values: Tensor, packing: Packing) -> Tensor:
    """The dense tensor of kept values, by functions that can be differentiated at will."""
    pattern, rows, shape = packing
    return functional.unpack(values, pattern, rows, "reference").view(shape)


def masked(dense: Tensor, pattern: RowPattern, rows: tuple[int, ...], scale: float) -> Tensor:
    """A dense tensor with dropped entries zeroed and kept ones scaled."""
    return dense * pattern.mask(*rows, dtype=dense.dtype, value=scale, device=dense.device).view(dense.shape)
