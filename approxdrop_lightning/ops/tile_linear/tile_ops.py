"""Triton products with the kept tiles of a weight, registered as PyTorch operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from approxdrop_lightning.ops.custom_op import Shape, custom_op
from approxdrop_lightning.ops.tile_linear.triton_tiles import product_launch, weight_grad_launch
from approxdrop_lightning.ops.triton.common import check_operands
from approxdrop_lightning.patterns.tile import TilePattern


@custom_op("approxdrop::tile_linear")
def _tile_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor, dp: int, keep: int, tile_size: int, scale: float
) -> Tensor:
    return _product(x, weight, bias, offset, dp, keep, tile_size, scale)


@custom_op("approxdrop::tile_linear_input_grad")
def _input_grad(
    dy: Tensor, weight: Tensor, offset: Tensor, dp: int, keep: int, tile_size: int, scale: float
) -> Tensor:
    return _product(dy, weight.t(), None, offset, dp, keep, tile_size, scale)


@custom_op("approxdrop::tile_linear_weight_grad")
def _weight_grad(dy: Tensor, x: Tensor, offset: Tensor, dp: int, keep: int, tile_size: int, scale: float) -> Tensor:
    dw = x.new_zeros(dy.shape[1], x.shape[1])
    weight_grad_launch(_rows(dy), _rows(x), dw, offset, dp, keep, tile_size, scale).run()
    return dw


def _product(
    x: Tensor, w: Tensor, bias: Tensor | None, offset: Tensor, dp: int, keep: int, tile_size: int, scale: float
) -> Tensor:
    y = x.new_empty(len(x), len(w))
    product_launch(_rows(x), w, bias, y, offset, dp, keep, tile_size, scale).run()
    return y


def _rows(x: Tensor) -> Tensor:
    """The matrix itself if its rows have unit stride, otherwise a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


@_tile_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, offset: Tensor, dp: int, keep: int, tile_size: int, scale: float
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_input_grad.register_fake
def _(dy: Tensor, weight: Tensor, offset: Tensor, dp: int, keep: int, tile_size: int, scale: float) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


@_weight_grad.register_fake
def _(dy: Tensor, x: Tensor, offset: Tensor, dp: int, keep: int, tile_size: int, scale: float) -> Tensor:
    return x.new_empty(dy.shape[1], x.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, offset, *ctx.pattern = inputs
    ctx.save_for_backward(x, weight, offset)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offset = ctx.saved_tensors
    dx = _input_grad(dy, weight, offset, *ctx.pattern) if ctx.needs_input_grad[0] else None
    dw = _weight_grad(dy, x, offset, *ctx.pattern) if ctx.needs_input_grad[1] else None
    db = dy.sum(0) if ctx.needs_input_grad[2] else None
    return dx, dw, db, None, None, None, None, None


_tile_linear.register_autograd(_backward, setup_context=_setup_context)
_tile_linear.register_autocast()


@register_flop_formula(torch.ops.approxdrop.tile_linear)
def _product_flops(
    x_shape: Shape, w_shape: Shape, bias_shape: Shape | None, offset_shape: Shape, dp: int, keep: int,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Two per row and kept weight, averaged over the offset."""
    return 2 * x_shape[0] * math.prod(w_shape) * keep // dp


@register_flop_formula(torch.ops.approxdrop.tile_linear_input_grad)
def _input_grad_flops(
    dy_shape: Shape, w_shape: Shape, offset_shape: Shape, dp: int, keep: int, *_: Any, **__: Any
) -> int:
    return 2 * dy_shape[0] * math.prod(w_shape) * keep // dp


@register_flop_formula(torch.ops.approxdrop.tile_linear_weight_grad)
def _weight_grad_flops(
    dy_shape: Shape, x_shape: Shape, offset_shape: Shape, dp: int, keep: int, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(dy_shape) * x_shape[1] * keep // dp


def tile_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: TilePattern, scale: float) -> Tensor:
    """See :meth:`.TileLinearBackend.tile_linear`. Tile sizes that are multiples of 16 allow wide loads.

    Raises:
        ValueError: The kernels do not support the type (float32, float16, bfloat16) or the device.
    """
    check_operands("tile_linear", x, weight)
    bias = None if bias is None else bias.contiguous()
    offset = torch.full((), pattern.offset, dtype=torch.int32, device=x.device)  # a fill does not synchronize
    return _tile_linear(x, weight, bias, offset, pattern.dp, pattern.keep, pattern.tile_size, float(scale))
