"""Operators of regular patterns that the batch shares.

A pattern is two integers, which are arguments of the operators and of the kernels: another ``(dp, offset)`` compiles
nothing. The gradient of the weight is an operator of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from approxdrop_lightning.ops.custom_op import custom_op
from approxdrop_lightning.ops.row_linear import triton_rows
from approxdrop_lightning.ops.row_linear.triton_rows import Kept
from approxdrop_lightning.ops.triton.common import Tiling, arch_of, run_fastest
from approxdrop_lightning.ops.triton.launch import Launch, before_activation, saved_for


@custom_op("approxdrop::rows_linear")
def rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_dp: int,
    in_offset: int,
    out_dp: int,
    out_offset: int,
    scale: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = act(scale * (x @ W[out_offset::out_dp, in_offset::in_dp].T + b[out_offset::out_dp]))``.

    Args:
        x: ``[M, kept inputs]``, contiguous.
        weight: ``[n_out, n_in]``, rows contiguous.
        bias: ``[n_out]`` or None.
        in_dp: Period of the kept inputs.
        in_offset: First kept input.
        out_dp: Period of the kept outputs.
        out_offset: First kept output.
        scale: Factor.
        activation: One of :data:`.reference.ACTIVATIONS`.

    Returns:
        ``y``, ``[M, kept outputs]``; the argument of GELU, or nothing; the packed weight, or nothing.
    """
    inside, outside = _kept(weight, in_dp, in_offset, out_dp, out_offset)
    y, z, packed = _rows_linear_results(x, weight, bias, in_dp, in_offset, out_dp, out_offset, scale, activation)
    if packed.numel():
        triton_rows.pack_launch(weight, packed, inside, outside).run()
    argument = z if activation == "gelu" else None
    read = packed if in_dp > 1 else weight

    def launch(tiling: Tiling) -> Launch:
        return triton_rows.product_launch(
            x, read, bias, y, argument, inside, outside, scale, tiling, activation,
            descriptors=arch_of(x.device) >= 90,
        )  # fmt: skip

    run_fastest("rows_linear", x, (len(x), *weight.shape), launch, triton_rows.aligned(x, inside, outside))
    return y, z, packed


@rows_linear.register_fake
def _rows_linear_results(x, weight, bias, in_dp, in_offset, out_dp, out_offset, scale, activation):
    inside, outside = _kept(weight, in_dp, in_offset, out_dp, out_offset)
    y = x.new_empty(x.shape[0], outside.count)
    z = torch.empty_like(y) if activation == "gelu" else y.new_empty(0)
    return y, z, x.new_empty(triton_rows.packed_shape(inside, outside) if in_dp > 1 else (0,))


@custom_op("approxdrop::rows_input_grad")
def rows_input_grad(
    dy: Tensor,
    weight: Tensor,
    n_out: int,
    n_in: int,
    in_dp: int,
    in_offset: int,
    out_dp: int,
    out_offset: int,
    scale: float,
) -> Tensor:
    """``scale * dy @ W[kept]``, ``[M, kept inputs]``; ``weight`` is packed if inputs are dropped."""
    dx = _rows_input_grad_result(dy, weight, n_out, n_in, in_dp, in_offset, out_dp, out_offset, scale)
    inside, outside = Kept(n_in, in_dp, in_offset), Kept(n_out, out_dp, out_offset)

    def launch(tiling: Tiling) -> Launch:
        return triton_rows.product_launch(
            dy, weight, None, dx, None, inside, outside, scale, tiling,
            forward=False, descriptors=arch_of(dy.device) >= 90,
        )  # fmt: skip

    run_fastest("rows_input_grad", dy, (len(dy), n_out, n_in), launch, triton_rows.aligned(dy, inside, outside))
    return dx


@rows_input_grad.register_fake
def _rows_input_grad_result(dy, weight, n_out, n_in, in_dp, in_offset, out_dp, out_offset, scale):
    return dy.new_empty(dy.shape[0], Kept(n_in, in_dp, in_offset).count)


@custom_op("approxdrop::rows_weight_grad")
def rows_weight_grad(
    dy: Tensor,
    x: Tensor,
    n_out: int,
    n_in: int,
    in_dp: int,
    in_offset: int,
    out_dp: int,
    out_offset: int,
    scale: float,
) -> Tensor:
    """``[n_out, n_in]``: ``scale * dy.T @ x`` at the kept entries, zero elsewhere."""
    dw = (dy.new_empty if in_dp == out_dp == 1 else dy.new_zeros)(n_out, n_in)
    inside, outside = Kept(n_in, in_dp, in_offset), Kept(n_out, out_dp, out_offset)

    def launch(tiling: Tiling) -> Launch:
        descriptors = arch_of(dy.device) >= 90
        return triton_rows.weight_grad_launch(dy, x, dw, inside, outside, scale, tiling, descriptors)

    run_fastest("rows_weight_grad", dy, (len(dy), n_out, n_in), launch, triton_rows.aligned(dy, inside, outside))
    return dw


@rows_weight_grad.register_fake
def _rows_weight_grad_result(dy, x, n_out, n_in, in_dp, in_offset, out_dp, out_offset, scale):
    return dy.new_empty(n_out, n_in)


def _kept(weight, in_dp, in_offset, out_dp, out_offset):
    return Kept(weight.shape[1], in_dp, in_offset), Kept(weight.shape[0], out_dp, out_offset)


def _rows_setup(ctx, inputs, output):
    x, weight, bias, *ctx.places, ctx.scale, ctx.activation = inputs
    y, z, packed = output
    in_dp = ctx.places[0]
    ctx.shape, ctx.bias = tuple(weight.shape), bias is not None
    ctx.save_for_backward(x, packed if in_dp > 1 else weight, *saved_for(ctx.activation, y, z))


def _rows_backward(ctx, dy, *_):
    x, weight, *values = ctx.saved_tensors
    dy = before_activation(ctx.activation, dy, *values)
    n_out, n_in = ctx.shape
    _, _, out_dp, out_offset = ctx.places
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = rows_input_grad(dy, weight, n_out, n_in, *ctx.places, ctx.scale)
    if ctx.needs_input_grad[1]:
        dw = rows_weight_grad(dy, x, n_out, n_in, *ctx.places, ctx.scale)
    if ctx.bias and ctx.needs_input_grad[2]:
        db = dy.new_zeros(n_out)
        db[out_offset::out_dp] = dy.sum(0) * ctx.scale
    return dx, dw, db, *[None] * 6


rows_linear.register_autograd(_rows_backward, setup_context=_rows_setup)
rows_linear.register_autocast()


@register_flop_formula(torch.ops.approxdrop.rows_linear)
def _(x, weight, bias, in_dp, in_offset, out_dp, out_offset, *_, **__) -> int:
    return 2 * x[0] * x[1] * Kept(weight[0], out_dp, out_offset).count


@register_flop_formula(torch.ops.approxdrop.rows_input_grad)
def _(dy, weight, n_out, n_in, in_dp, in_offset, *_, **__) -> int:
    return 2 * dy[0] * dy[1] * Kept(n_in, in_dp, in_offset).count


@register_flop_formula(torch.ops.approxdrop.rows_weight_grad)
def _(dy, x, *_, **__) -> int:
    return 2 * dy[0] * dy[1] * x[1]
