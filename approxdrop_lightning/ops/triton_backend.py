"""The Triton backend: checks the operands and dispatches to the implementations."""

from __future__ import annotations

from torch import Tensor

from approxdrop_lightning.ops.row_linear import packed
from approxdrop_lightning.ops.tile_linear.tile_ops import tile_linear as tile_linear
from approxdrop_lightning.ops.triton.common import check_operands
from approxdrop_lightning.patterns.row import RowPattern


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """See :meth:`.RowLinearBackend.pack`."""
    check_operands("pack", x)
    return packed.pack(x, pattern)


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """See :meth:`.RowLinearBackend.unpack`."""
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
    """See :meth:`.RowLinearBackend.row_linear`.

    Raises:
        ValueError: The kernels do not support the type or the device.
    """
    check_operands("row_linear", x, weight)
    return packed.row_linear(x, weight, bias, in_pattern, out_pattern, leading_shape, scale, activation)
