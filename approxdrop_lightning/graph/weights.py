"""The kept rows and columns of a weight for each group, and the dense gradients of them, as gathers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.graph import kernels
from approxdrop_lightning.graph.layout import TableUse


class KeptWeights(torch.autograd.Function):
    """The submatrix of a weight for each group, ``[groups, outputs, inputs]``; its gradient is a gather too.

    The outputs may consist of several ``chunks`` of ``n`` units (gates), in each of which the same units are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, table: Tensor, outside: TableUse | None, inside: TableUse | None, chunks: int
    ) -> Tensor:
        ctx.save_for_backward(table)
        ctx.uses, ctx.shape, ctx.chunks = (outside, inside), weight.shape, chunks
        n_out, n_in = weight.shape
        ctx.by_kernel = chunks == 1 and kernels.serves(weight)
        if ctx.by_kernel:
            return kernels.pack(weight, table, outside, inside)
        if inside is None:
            assert outside is not None
            o = outside.layout
            part = weight.view(chunks, o.blocks, o.block, n_in)[:, outside.kept_blocks(table)]
            return part.transpose(0, 1).reshape(o.all_groups, chunks * o.width, n_in)
        i, columns = inside.layout, inside.kept_blocks(table)
        if outside is None:
            part = weight.view(n_out, i.blocks, i.block)[:, columns]  # [out, groups, kept, block]
            return part.transpose(0, 1).reshape(i.all_groups, n_out, i.width)
        o, rows = outside.layout, outside.kept_blocks(table)
        part = weight.view(chunks, o.blocks, o.block, i.blocks, i.block).permute(1, 3, 0, 2, 4)
        part = part[rows[:, :, None], columns[:, None, :]]  # [groups, kept out, kept in, chunks, block, block]
        return part.permute(0, 3, 1, 4, 2, 5).reshape(o.all_groups, chunks * o.width, i.width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (table,) = ctx.saved_tensors
        outside, inside = ctx.uses
        if ctx.by_kernel:
            return kernels.unpack(grad, table, outside, inside, ctx.shape), None, None, None, None
        dense = _expanded(grad, table, outside, inside, ctx.chunks)
        return dense.reshape(ctx.shape), None, None, None, None


def _expanded(grad: Tensor, table: Tensor, outside: TableUse | None, inside: TableUse | None, chunks: int) -> Tensor:
    """Dense gradient of :class:`KeptWeights`: the sum over orders, and over groups if they overlap."""
    some = outside or inside
    assert some is not None
    s = some.layout
    o_block, o_kept = (outside.block, outside.kept) if outside is not None else (grad.shape[1] // chunks, 1)
    i_block, i_kept = (inside.block, inside.kept) if inside is not None else (grad.shape[2], 1)
    # [orders, groups, kept out, kept in, chunks, block out, block in]
    grad = grad.view(s.orders, s.groups, chunks, o_kept, o_block, i_kept, i_block).permute(0, 1, 3, 5, 2, 4, 6)
    together = all(use is None or use.layout.disjoint for use in (outside, inside))
    total: Tensor | None = None
    for order in range(s.orders):
        for group in [None] if together else range(s.groups):
            part = _expanded_one(grad[order], table, outside, inside, order, group)
            total = part if total is None else total + part
    assert total is not None
    return total.permute(2, 0, 3, 1, 4)  # [chunks, blocks out, block out, blocks in, block in]


def _expanded_one(
    grad: Tensor, table: Tensor, outside: TableUse | None, inside: TableUse | None, order: int, group: int | None
) -> Tensor:
    """Contribution of one order to the gradient: of all its groups, or of one ``group``."""
    found: list[tuple[Tensor, Tensor, Tensor] | None] = []
    for use in (outside, inside):
        if use is None:
            found.append(None)
            continue
        s, place = use.layout, use.place(table)[order]
        if group is None:
            last = s.groups * s.kept
            safe = place.clamp(max=last - 1)
            found.append((safe // s.kept, safe % s.kept, place < last))
        else:
            at = place - group * s.shift
            found.append((torch.full_like(at, group), at.clamp(0, s.kept - 1), (at >= 0) & (at < s.kept)))
    out, into = found
    if out is not None and into is not None:
        keep = out[2][:, None] & into[2] & (out[0][:, None] == into[0])
        part = grad[out[0][:, None], out[1][:, None], into[1][None, :]]
    elif out is not None:
        keep, part = out[2][:, None], grad[out[0], out[1]]
    else:
        assert into is not None
        keep, part = into[2][None, :], grad[into[0], :, into[1]].transpose(0, 1)
    return torch.where(keep[:, :, None, None, None], part, 0)


def expand_units(grad: Tensor, table: Tensor, outside: TableUse) -> Tensor:
    """Gradient of a bias: ``[groups, width]`` to the dense sum ``[n]``."""
    return _expanded(grad[..., None], table, outside, None, 1).reshape(outside.n)
