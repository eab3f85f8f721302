"""Linear layer between interleaved patterns that keep several cells: the groups' blocks of the weight overlap.

Packing a block for each group would copy ``keep^2 / dp`` of the weight, and adding the blocks' gradients up by
index costs more than the product that was saved. So the weight is copied once, its units sorted by cell: the kept
cells of a group are then one or two ranges, its blocks are views, and gradients add up in place, by the product
itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from approxdrop_lightning.ops.groups import Groups
from approxdrop_lightning.pattern import RowPattern

_Range = tuple[slice, slice]  # of the group's matrix, of the sorted weight


class _Side:
    """The inputs or the outputs: which units are read, in which order, and each group's ranges of them."""

    def __init__(self, pattern: RowPattern | None, count: int, device: torch.device) -> None:
        self.units: Tensor | None = None
        self.ranges: list[list[_Range]] = [[(slice(None), slice(None))]] * count
        if pattern is not None and not pattern.interleave:
            self.units = pattern.kept.to(device)
        elif pattern is not None:
            self.units = torch.cat(pattern.by_cell).to(device)
            ends = [0]
            for cell in pattern.by_cell:
                ends.append(ends[-1] + cell.numel())
            self.ranges = [self._ranges(pattern, (pattern.offset + g) % pattern.dp, ends) for g in range(count)]

    @staticmethod
    def _ranges(pattern: RowPattern, first: int, ends: list[int]) -> list[_Range]:
        """The cells first, first + 1, ..., around the end if need be."""
        last = min(first + pattern.keep, pattern.dp)
        width = ends[last] - ends[first]
        ranges = [(slice(0, width), slice(ends[first], ends[last]))]
        if beyond := ends[first + pattern.keep - last]:
            ranges.append((slice(width, width + beyond), slice(0, beyond)))
        return ranges

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """Sort a dimension of the weight."""
        return tensor if self.units is None else tensor.index_select(dim, self.units)

    def put(self, tensor: Tensor, dim: int, size: int) -> Tensor:
        """Undo the sorting in a gradient; units that nobody has read have none."""
        if self.units is None:
            return tensor
        if self.units.numel() == size:  # all of them: reading by the inverse is cheaper than writing
            return tensor.index_select(dim, self.units.argsort())
        shape = list(tensor.shape)
        shape[dim] = size
        return tensor.new_zeros(shape).index_copy_(dim, self.units, tensor)


class RowLinear(torch.autograd.Function):
    """As the function of that name in :mod:`.compact`."""

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
        inside, outside = (_Side(p, groups.count, weight.device) for p in (in_pattern, out_pattern))
        xs = groups.inputs(x)
        by_cell = inside.take(outside.take(weight, 0), 1)
        buffer, ys = groups.new_output(x)
        for x_g, y_g, reads, writes in zip(xs, ys, inside.ranges, outside.ranges, strict=True):
            for here, rows in writes:
                _product(y_g[:, here], [(x_g[:, there], by_cell[rows, columns].t()) for there, columns in reads])
        if bias is not None:
            groups.add_bias(ys, bias)
        ctx.groups, ctx.inside, ctx.outside = groups, inside, outside
        ctx.bias, ctx.x_shape = bias is not None, x.shape
        ctx.save_for_backward(by_cell, *xs)
        return groups.output(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups, inside, outside = ctx.groups, ctx.inside, ctx.outside
        by_cell, *xs = ctx.saved_tensors
        dys = groups.output_grads(grad)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            buffer, dxs = groups.new_input(grad)
            for dx_g, dy_g, reads, writes in zip(dxs, dys, inside.ranges, outside.ranges, strict=True):
                for there, columns in reads:
                    _product(dx_g[:, there], [(dy_g[:, here], by_cell[rows, columns]) for here, rows in writes])
            dx = groups.input_grad(buffer).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            dw = torch.zeros_like(by_cell)
            for x_g, dy_g, reads, writes in zip(xs, dys, inside.ranges, outside.ranges, strict=True):
                for here, rows in writes:
                    for there, columns in reads:
                        dw[rows, columns].addmm_(dy_g[:, here].t(), x_g[:, there])
            dw = inside.put(outside.put(dw, 0, groups.shape[0]), 1, groups.shape[1])
        if ctx.bias and ctx.needs_input_grad[2]:
            db = groups.bias_grad(dys)
        return dx, dw, db, None, None, None


def _product(out: Tensor, factors: list[tuple[Tensor, Tensor]]) -> None:
    """``out = sum of a @ b``."""
    (a, b), *others = factors
    torch.mm(a, b, out=out)
    for a, b in others:
        out.addmm_(a, b)
