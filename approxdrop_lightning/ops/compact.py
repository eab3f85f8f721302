"""Gather and multiply: products over kept units only, in plain PyTorch calls, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from approxdrop_lightning.ops import overlap
from approxdrop_lightning.ops.groups import Groups, multiply
from approxdrop_lightning.pattern import RowPattern


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pattern: RowPattern) -> Tensor:
        ctx.shape = x.shape
        index = pattern.flat_index(tuple(x.shape[:-1])).to(x.device)
        ctx.save_for_backward(index)
        return x.reshape(-1).index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dense = grad.new_zeros(ctx.shape)
        dense.view(-1)[index] = grad.reshape(-1)
        return dense, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
        index = pattern.flat_index(leading_shape).to(values.device)
        ctx.save_for_backward(index)
        ctx.shape = values.shape
        dense = values.new_zeros(*leading_shape, pattern.n)
        dense.view(-1)[index] = values.reshape(-1)
        return dense

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.reshape(-1).index_select(0, index).view(ctx.shape), None, None


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
        groups = Groups(in_pattern, out_pattern, leading_shape, weight)
        xs = groups.inputs(x)
        weights = groups.weights(weight)
        buffer, y = groups.new_output(x)
        multiply(xs, [w.t() for w in weights], y)
        if bias is not None:
            groups.add_bias(y, bias)
        ctx.groups, ctx.bias, ctx.x_shape = groups, bias is not None, x.shape
        ctx.save_for_backward(*xs, *weights)
        return groups.output(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups: Groups = ctx.groups
        saved = ctx.saved_tensors
        xs, weights = saved[: groups.count], saved[groups.count :]
        dys = groups.output_grads(grad)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            buffer, dxs = groups.new_input(grad)
            multiply(dys, weights, dxs)
            dx = groups.input_grad(buffer).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            dw = groups.weight_grad(dys, xs)
        if ctx.bias and ctx.needs_input_grad[2]:
            db = groups.bias_grad(dys)
        return dx, dw, db, None, None, None


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """Values that the pattern keeps of a dense ``[*leading, n]``: flat, group after group."""
    return _Pack.apply(x, pattern)


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """Dense ``[*leading, n]`` with zeros where the pattern drops; inverse of :func:`pack`."""
    return _Unpack.apply(values, pattern, leading_shape)


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_pattern: RowPattern | None,
    out_pattern: RowPattern | None,
    leading_shape: tuple[int, ...],
) -> Tensor:
    """Products over kept units only.

    Args:
        x: Dense ``[*leading, n_in]``, or packed values if ``in_pattern`` is given.
        weight: ``[n_out, n_in]``, dense; its gradient is dense as well.
        bias: ``[n_out]`` or None.
        in_pattern: What is kept of the inputs.
        out_pattern: What is kept of the outputs.
        leading_shape: Shape of the batch.

    Returns:
        Rows ``[R, n_out]``, or packed values if ``out_pattern`` is given; contiguous, possibly flat.
    """
    several = any(p is not None and p.interleave and p.keep > 1 for p in (in_pattern, out_pattern))
    function = overlap.RowLinear if several else _RowLinear
    return function.apply(x, weight, bias, in_pattern, out_pattern, leading_shape)


class _SelectColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.shape = weight.shape
        ctx.save_for_backward(kept)
        return weight.index_select(1, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_(1, kept.expand(grad.shape), grad), None


def select_columns(weight: Tensor, pattern: RowPattern) -> Tensor:
    """Kept columns of a weight, ``[n_out, n_kept]``; the gradient is dense."""
    return _SelectColumns.apply(weight, pattern.kept.to(weight.device))
