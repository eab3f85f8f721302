"""The Triton backend: which operator computes."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning.ops.row_linear import reference
from approxdrop_lightning.ops.row_linear.group_ops import gather, groups_linear, scatter
from approxdrop_lightning.ops.row_linear.row_ops import rows_linear
from approxdrop_lightning.ops.row_linear.tables import make_plan
from approxdrop_lightning.ops.row_linear.triton_rows import Kept
from approxdrop_lightning.ops.tile_linear.tile_ops import tile_linear as tile_linear
from approxdrop_lightning.ops.triton.common import check_operands
from approxdrop_lightning.patterns.row import RowPattern


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """Values that the pattern keeps of a dense ``[*leading, n]``: flat, group after group."""
    check_operands("pack", x)
    rows = x.reshape(-1, pattern.n).contiguous()
    plan = make_plan(pattern, None, tuple(x.shape[:-1]), rows)
    return gather(rows, plan.tables, plan.sizes, plan.in_shape).view(-1)


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """Dense ``[*leading, n]`` with zeros where the pattern drops; inverse of :func:`pack`."""
    check_operands("unpack", values)
    plan = make_plan(pattern, None, leading_shape, values.new_empty(0, pattern.n))
    values = values.reshape(plan.in_shape).contiguous()
    return scatter(values, plan.tables, plan.sizes, pattern.n).view(*leading_shape, pattern.n)


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
    n_out, n_in = weight.shape
    inside, outside = _regular(in_pattern, n_in), _regular(out_pattern, n_out)
    if inside and outside and inside.dp == outside.dp == 1:
        return reference.finish(F.linear(x.reshape(-1, n_in), weight, bias), scale, activation)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if inside and outside:
        x = x.reshape(math.prod(leading_shape), inside.count).contiguous()
        places = (inside.dp, inside.offset, outside.dp, outside.offset)
        return rows_linear(x, weight, bias, *places, scale, activation)[0]
    plan = make_plan(in_pattern, out_pattern, leading_shape, weight)
    x = x.reshape(plan.in_shape).contiguous()
    return groups_linear(x, weight, bias, *plan[:4], scale, activation)[0]


def _regular(pattern: RowPattern | None, n: int) -> Kept | None:
    """The pattern as two integers, if it is regular and shared."""
    if pattern is None or pattern.dp == 1:
        return Kept(n, 1, 0)
    if pattern.interleave or pattern.keep > 1 or pattern.order is not None or pattern.block_size > 1:
        return None
    return Kept(n, pattern.dp, pattern.offset)
