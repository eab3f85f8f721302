"""The Triton backend: which function computes."""

from __future__ import annotations

from torch import Tensor

from approxdrop_lightning.ops.row_linear import packed
from approxdrop_lightning.ops.tile_linear.tile_ops import tile_linear as tile_linear
from approxdrop_lightning.ops.triton.common import check_operands
from approxdrop_lightning.patterns.row import RowPattern


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """Values that the pattern keeps of a dense ``[*leading, n]``: flat, group after group."""
    check_operands("pack", x)
    return packed.pack(x, pattern)


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """Dense ``[*leading, n]`` with zeros where the pattern drops; inverse of :func:`pack`."""
    check_operands("unpack", values)
    return packed.unpack(values, pattern, leading_shape)


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_pattern: RowPattern | None,
    out_pattern: RowPattern | None,
    leading_shape: tuple[int, ...],
    scale: float = 1.0,
    activation: str = "identity",
) -> Tensor:
    """``act(scale * product)`` over kept units only. Shapes as in :mod:`.compact`.

    Raises:
        ValueError: The type or the device is not one that the kernels are for.
    """
    check_operands("row_linear", x, weight)
    return packed.row_linear(x, weight, bias, in_pattern, out_pattern, leading_shape, scale, activation)
