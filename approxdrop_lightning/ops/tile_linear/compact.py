"""The compact backend: a few dense products of the submatrices formed by the kept tiles, on any device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.ops.derivative import must_be_differentiable, vjp
from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.copies import zero
from approxdrop_lightning.ops.native.product import Submatrix, multiply
from approxdrop_lightning.ops.tile_linear import reference
from approxdrop_lightning.patterns.tile import TilePattern
from approxdrop_lightning.patterns.units import Units


def _product(x: Tensor, weight: Tensor, pattern: TilePattern) -> Tensor:
    """``x @ (weight * mask).T``; each submatrix of the weight computes a separate part of the outputs."""
    rows = Units.every(len(x))
    y = x.new_empty(len(x), pattern.n_out)
    multiply(
        [
            (Submatrix(x, rows, inputs), Submatrix(weight, outputs, inputs).t, Submatrix(y, rows, outputs), False)
            for outputs, inputs in pattern.submatrices()
        ]
    )
    return y


def _weight_grad(dy: Tensor, x: Tensor, pattern: TilePattern) -> Tensor:
    """``(dy.T @ x) * mask``, dense."""
    rows = Units.every(len(x))
    grad = buffer((pattern.n_out, pattern.n_in), dy, exact=True)
    if not pattern.keeps_all:
        for outputs, inputs in pattern.dropped.submatrices():
            zero(grad, outputs, inputs)
    multiply(
        [
            (Submatrix(dy, rows, outputs).t, Submatrix(x, rows, inputs), Submatrix(grad, outputs, inputs), False)
            for outputs, inputs in pattern.submatrices()
        ],
        past_caches=True,
    )
    return grad


class _TileLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, pattern: TilePattern, scale: float
    ) -> Tensor:
        y = _product(x, weight, pattern)
        if bias is not None:
            torch.add(bias, y, alpha=scale, out=y)
        elif scale != 1.0:
            y *= scale
        ctx.pattern, ctx.scale = pattern, scale
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        pattern: TilePattern = ctx.pattern
        if must_be_differentiable(dy):
            bias = weight.new_zeros(len(weight)) if ctx.needs_input_grad[2] else None
            masked = partial(reference.tile_linear, pattern=pattern, scale=ctx.scale)
            return *vjp(masked, (x, weight, bias), ctx.needs_input_grad[:3], dy), None, None
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        dy = dy.contiguous() if ctx.scale == 1.0 else dy * ctx.scale
        dx = _product(dy, weight.t(), pattern.t) if ctx.needs_input_grad[0] else None
        dw = _weight_grad(dy, x, pattern) if ctx.needs_input_grad[1] else None
        return dx, dw, db, None, None


def tile_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: TilePattern, scale: float) -> Tensor:
    """See :meth:`.TileLinearBackend.tile_linear`."""
    return _TileLinear.apply(_readable(x), _readable(weight), bias, pattern, scale)


def _readable(matrix: Tensor) -> Tensor:
    """The matrix itself if one of its dimensions has unit stride, otherwise a copy."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()
