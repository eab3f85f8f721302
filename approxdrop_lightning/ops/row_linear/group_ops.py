"""Operators of interleaved and shuffled patterns, and of those that keep several cells.

A pattern is tables on the device (:mod:`.tables`): another one of the same ``(dp, keep)`` compiles nothing, and
changes no shape where cells are equal. The gradients of weight and bias are operators of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from approxdrop_lightning.ops.custom_op import custom_op
from approxdrop_lightning.ops.row_linear import group_launches
from approxdrop_lightning.ops.row_linear.tables import PAIR_FIELDS, SEGMENT_FIELDS, Sizes, Tables
from approxdrop_lightning.ops.triton.common import Tiling, run_fastest
from approxdrop_lightning.ops.triton.launch import Launch, before_activation, saved_for


def _run(name: str, x: Tensor, tables: Tables, sizes: Sizes, launch: Callable[[Tiling], Launch]) -> None:
    dense = (tables.rows.numel(), sizes.n_out, sizes.n_in)
    run_fastest(name, x, dense, launch, group_launches.aligned(sizes))


@custom_op("approxdrop::groups_linear")
def groups_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    in_shape: Sequence[int],
    out_shape: Sequence[int],
    scale: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y[g] = act(scale * (x[g] @ W_g.T + b_g))`` for each group of rows.

    Args:
        x: Values of the inputs, of ``in_shape``, contiguous.
        weight: ``[n_out, n_in]``, rows contiguous.
        bias: ``[n_out]`` or None.
        tables: Of a plan.
        sizes: Of the plan.
        in_shape: Of the plan.
        out_shape: Of the plan.
        scale: Factor.
        activation: One of :data:`.reference.ACTIVATIONS`.

    Returns:
        ``y``, of ``out_shape``; the argument of GELU, or nothing; the packed weight, or nothing.
    """
    tables, sizes = Tables(*tables), Sizes(*sizes)
    y, z, packed = _groups_linear_results(x, weight, bias, tables, sizes, in_shape, out_shape, scale, activation)
    if packed.numel():
        group_launches.pack_launch(weight, packed, tables, sizes).run()
    argument = z if activation == "gelu" else None
    read = packed if group_launches.packs(sizes) else weight

    def launch(tiling: Tiling) -> Launch:
        return group_launches.product_launch(x, read, bias, y, argument, tables, sizes, scale, tiling, activation)

    _run("groups_linear", x, tables, sizes, launch)
    return y, z, packed


@groups_linear.register_fake
def _groups_linear_results(x, weight, bias, tables, sizes, in_shape, out_shape, scale, activation):
    y = x.new_empty(out_shape)
    z = torch.empty_like(y) if activation == "gelu" else y.new_empty(0)
    sizes = Sizes(*sizes)
    return (
        y,
        z,
        x.new_empty(group_launches.packed_shape(sizes) if group_launches.packs(sizes) else (0,)),
    )


@custom_op("approxdrop::groups_input_grad")
def groups_input_grad(
    dy: Tensor, weight: Tensor, tables: Sequence[Tensor], sizes: Sequence[int], in_shape: Sequence[int], scale: float
) -> Tensor:
    """``dx[g] = scale * dy[g] @ W_g``, of ``in_shape``; ``weight`` as the forward product read it."""
    tables, sizes = Tables(*tables), Sizes(*sizes)
    dx = _groups_input_grad_result(dy, weight, tables, sizes, in_shape, scale)

    def launch(tiling: Tiling) -> Launch:
        return group_launches.product_launch(dy, weight, None, dx, None, tables, sizes, scale, tiling, forward=False)

    _run("groups_input_grad", dy, tables, sizes, launch)
    return dx


@groups_input_grad.register_fake
def _groups_input_grad_result(dy, weight, tables, sizes, in_shape, scale):
    return dy.new_empty(in_shape)


@custom_op("approxdrop::groups_weight_grad")
def groups_weight_grad(
    dy: Tensor, x: Tensor, tables: Sequence[Tensor], sizes: Sequence[int], n_out: int, n_in: int, scale: float
) -> Tensor:
    """``[n_out, n_in]``: sum over the groups that keep an entry of ``scale * dy[g].T @ x[g]``, zero elsewhere."""
    tables, sizes = Tables(*tables), Sizes(*sizes)

    def of_one_order(pairs: Tensor) -> Tensor:
        dw, part = dy.new_zeros(n_out, n_in), tables._replace(pairs=pairs)

        def launch(tiling: Tiling) -> Launch:
            return group_launches.weight_grad_launch(dy, x, dw, part, sizes, scale, tiling)

        _run("groups_weight_grad", dy, part, sizes, launch)
        return dw

    return _sum_over_orders(tables.pairs, PAIR_FIELDS, sizes, of_one_order)


def _sum_over_orders(records: Tensor, fields: int, sizes: Sizes, of_one_order: Callable[[Tensor], Tensor]) -> Tensor:
    """A launch writes each entry once, but orders of the units have entries in common: one for each, added up."""
    first, *others = records.view(-1, fields).chunk(sizes.orders)
    total = of_one_order(first)
    for other in others:
        total += of_one_order(other)
    return total


@groups_weight_grad.register_fake
def _groups_weight_grad_result(dy, x, tables, sizes, n_out, n_in, scale):
    return dy.new_empty(n_out, n_in)


@custom_op("approxdrop::groups_bias_grad")
def groups_bias_grad(dy: Tensor, tables: Sequence[Tensor], sizes: Sequence[int], n_out: int, scale: float) -> Tensor:
    """``[n_out]``: sum of ``scale * dy`` over the rows that keep an output."""
    tables, sizes = Tables(*tables), Sizes(*sizes)

    def of_one_order(segments: Tensor) -> Tensor:
        db = dy.new_zeros(n_out)
        part = tables._replace(segments=segments)
        group_launches.bias_grad_launch(dy, db, part, sizes, scale).run()
        return db

    return _sum_over_orders(tables.segments, SEGMENT_FIELDS, sizes, of_one_order)


@groups_bias_grad.register_fake
def _groups_bias_grad_result(dy, tables, sizes, n_out, scale):
    return dy.new_empty(n_out)


def _groups_setup(ctx, inputs, output):
    x, weight, bias, tables, ctx.sizes, ctx.in_shape, _, ctx.scale, ctx.activation = inputs
    y, z, packed = output
    ctx.shape, ctx.bias, ctx.n_tables = tuple(weight.shape), bias is not None, len(tables)
    read = packed if group_launches.packs(Sizes(*ctx.sizes)) else weight
    ctx.save_for_backward(x, read, *tables, *saved_for(ctx.activation, y, z))


def _groups_backward(ctx, dy, *_):
    x, weight, *rest = ctx.saved_tensors
    tables, values = rest[: ctx.n_tables], rest[ctx.n_tables :]
    dy = before_activation(ctx.activation, dy, *values)
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = groups_input_grad(dy, weight, tables, ctx.sizes, ctx.in_shape, ctx.scale)
    if ctx.needs_input_grad[1]:
        dw = groups_weight_grad(dy, x, tables, ctx.sizes, *ctx.shape, ctx.scale)
    if ctx.bias and ctx.needs_input_grad[2]:
        db = groups_bias_grad(dy, tables, ctx.sizes, ctx.shape[0], ctx.scale)
    return dx, dw, db, [None] * ctx.n_tables, *[None] * 5


groups_linear.register_autograd(_groups_backward, setup_context=_groups_setup)
groups_linear.register_autocast()


@register_flop_formula([torch.ops.approxdrop.groups_linear])
def _(x, weight, bias, tables, sizes, *_, **__) -> int:
    return 2 * Sizes(*sizes).multiplies


@register_flop_formula([torch.ops.approxdrop.groups_input_grad, torch.ops.approxdrop.groups_weight_grad])
def _(dy, other, tables, sizes, *_, **__) -> int:
    return 2 * Sizes(*sizes).multiplies


@custom_op("approxdrop::gather")
def gather(dense: Tensor, tables: Sequence[Tensor], sizes: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Kept values of dense rows ``[R, n]``, of ``shape``: the inputs of a plan."""
    values = dense.new_empty(shape)
    group_launches.copy_launch(dense, values, Tables(*tables), Sizes(*sizes), gather=True).run()
    return values


@gather.register_fake
def _gather_result(dense, tables, sizes, shape):
    return dense.new_empty(shape)


@custom_op("approxdrop::scatter")
def scatter(values: Tensor, tables: Sequence[Tensor], sizes: Sequence[int], n: int) -> Tensor:
    """Inverse of :func:`gather`, with zeros where nothing is kept."""
    dense = values.new_zeros(tables[0].numel(), n)
    group_launches.copy_launch(dense, values, Tables(*tables), Sizes(*sizes), gather=False).run()
    return dense


@scatter.register_fake
def _scatter_result(values, tables, sizes, n):
    return values.new_empty(tables[0].numel(), n)


def _copy_setup(ctx, inputs, output):
    first, tables, ctx.sizes, _ = inputs
    ctx.shape = tuple(first.shape)
    ctx.save_for_backward(*tables)


def _gather_backward(ctx, grad):
    return (
        scatter(grad.contiguous(), ctx.saved_tensors, ctx.sizes, ctx.shape[1]),
        [None] * len(Tables._fields),
        None,
        None,
    )


def _scatter_backward(ctx, grad):
    return (
        gather(grad.contiguous(), ctx.saved_tensors, ctx.sizes, ctx.shape),
        [None] * len(Tables._fields),
        None,
        None,
    )


gather.register_autograd(_gather_backward, setup_context=_copy_setup)
scatter.register_autograd(_scatter_backward, setup_context=_copy_setup)
