"""The compact backend: gathers the kept units and multiplies them, on any device.

In float32 on the CPU, compiled kernels read and write the operands in place (:mod:`approxdrop_lightning.ops.native`);
otherwise PyTorch multiplies gathered copies.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.ops.derivative import is_transformed, must_be_differentiable, vjp
from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.copies import put, take
from approxdrop_lightning.ops.row_linear import groups, reference
from approxdrop_lightning.ops.row_linear.groups import GroupedLinear
from approxdrop_lightning.ops.row_linear.one_pass import linear_between
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.units import Units


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pattern: RowPattern) -> Tensor:
        ctx.pattern, ctx.leading_shape = pattern, tuple(x.shape[:-1])
        return groups.pack(x, pattern)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if must_be_differentiable(grad):
            return reference.unpack(grad, ctx.pattern, ctx.leading_shape), None
        return groups.unpack(grad, ctx.pattern, ctx.leading_shape), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
        ctx.pattern, ctx.shape = pattern, values.shape
        return groups.unpack(values, pattern, leading_shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if must_be_differentiable(grad):
            return reference.pack(grad, ctx.pattern).view(ctx.shape), None, None
        return groups.pack(grad, ctx.pattern).view(ctx.shape), None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_pattern: RowPattern | None,
        out_pattern: RowPattern | None,
        leading_shape: tuple[int, ...],
    ) -> Tensor:
        layer = linear_between(in_pattern, out_pattern, leading_shape, weight)
        y = layer.product(x, weight, bias)
        ctx.layer, ctx.bias = layer, bias is not None
        ctx.patterns = in_pattern, out_pattern, leading_shape
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer: GroupedLinear = ctx.layer
        x, weight = ctx.saved_tensors
        if must_be_differentiable(grad):
            bias = weight.new_zeros(len(weight)) if ctx.bias else None
            masked = partial(_masked_row_linear, ctx.patterns, tuple(grad.shape))
            return *vjp(masked, (x, weight, bias), ctx.needs_input_grad[:3], grad), None, None, None
        return *layer.gradients(grad, x, weight, ctx.needs_input_grad[:3]), None, None, None


def _masked_row_linear(
    patterns: tuple[Any, ...], shape: tuple[int, ...], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return reference.row_linear(x, weight, bias, *patterns).view(shape)


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """See :meth:`.RowLinearBackend.pack`."""
    return _Pack.apply(x, pattern)


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """See :meth:`.RowLinearBackend.unpack`."""
    return _Unpack.apply(values, pattern, leading_shape)


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
    """See :meth:`.RowLinearBackend.row_linear`."""
    y = _RowLinear.apply(x, weight, bias, in_pattern, out_pattern, leading_shape)
    return reference.finish(y, scale, activation)


class _SelectColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, pattern: RowPattern) -> Tensor:
        ctx.shape, ctx.pattern = weight.shape, pattern
        return take(weight, Units.every(len(weight)), pattern.units(0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if must_be_differentiable(grad):
            columns = ctx.pattern.units(0).on(grad.device)
            return grad.new_zeros(ctx.shape).index_copy(1, columns, grad), None
        dense = buffer(tuple(ctx.shape), grad, exact=True)
        put(dense, Units.every(len(dense)), ctx.pattern.units(0), grad, clear=True)
        return dense, None


def select_columns(weight: Tensor, pattern: RowPattern) -> Tensor:
    """The kept columns of a weight, ``[n_out, n_kept]``; the gradient is dense."""
    if is_transformed():
        return weight.index_select(1, pattern.units(0).on(weight.device))
    return _SelectColumns.apply(weight, pattern)
