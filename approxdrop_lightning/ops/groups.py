"""What each group of rows reads and writes of inputs, outputs and weight.

Packed values are flat, group after group, each group a row-major matrix ``[rows of the group, kept units of
the group]``. Elementwise functions need not know; the groups need not be of one size; and what one layer
packs the next one reads without a copy. Where all groups are of one size, their products are one batched
product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from approxdrop_lightning.ops.blocks import buffer, clear, put, take
from approxdrop_lightning.pattern import RowPattern, Units


def multiply(a: list[Tensor], b: list[Tensor], out: list[Tensor]) -> None:
    """``out[g] = a[g] @ b[g]``: one batched product where the groups are slices of one buffer each."""
    stacks = [_stack(matrices) for matrices in (a, b, out)] if len(a) > 1 else [None]
    if all(stack is not None for stack in stacks):
        torch.bmm(stacks[0], stacks[1], out=stacks[2])
        return
    for a_g, b_g, out_g in zip(a, b, out, strict=True):
        torch.mm(a_g, b_g, out=out_g)


def _stack(matrices: list[Tensor]) -> Tensor | None:
    """The ``[groups, rows, columns]`` tensor whose slices the matrices are, if there is one."""
    first = matrices[0]
    step = first.numel()
    for g, matrix in enumerate(matrices):
        if (
            matrix.shape != first.shape
            or matrix.stride() != first.stride()
            or matrix.storage_offset() != first.storage_offset() + g * step
            or matrix.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride()))


class Side:
    """The inputs or the outputs of a layer: which units each group reads or writes.

    Args:
        pattern: What is kept; None for everything.
        n: Number of units.
        count: Number of groups.
    """

    def __init__(self, pattern: RowPattern | None, n: int, count: int) -> None:
        self.pattern, self.n = pattern, n
        every = Units.every(n)
        self.units = [every if pattern is None else pattern.units(g % pattern.n_groups) for g in range(count)]
        self.widths = [units.count for units in self.units]
        #: Whether values are packed by group; else they are rows in their order.
        self.by_group = pattern is not None and pattern.n_groups > 1
        self.overlaps = pattern is not None and pattern.overlaps
        #: What some group keeps, in the order in which each group's units are a range of them.
        self.covered = pattern.covered if self.by_group else self.units[0]
        self.places = [pattern.place(g) if self.by_group else slice(None) for g in range(count)]


class Groups:
    """One layer's inputs, outputs and weight by groups; one group of all rows where nothing is interleaved."""

    def __init__(
        self,
        in_pattern: RowPattern | None,
        out_pattern: RowPattern | None,
        leading_shape: tuple[int, ...],
        weight: Tensor,
    ) -> None:
        grouped = next((p for p in (in_pattern, out_pattern) if p is not None and p.n_groups > 1), None)
        self.count = 1 if grouped is None else grouped.n_groups
        n_out, n_in = weight.shape
        self.inside = Side(in_pattern, n_in, self.count)
        self.outside = Side(out_pattern, n_out, self.count)
        self.rows = (grouped or RowPattern(1, 1, 0)).row_groups(leading_shape)
        self.row_counts = [r.count for r in self.rows]
        # Then a group's block of the weight is a view of a copy that is sorted by cell, since blocks have entries in
        # common; else each group has a block of its own.
        self.overlaps = self.inside.overlaps or self.outside.overlaps

    def new(self, side: Side, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Memory for values of a side: flat, and cut into the groups' matrices."""
        flat = buffer((sum(r * w for r, w in zip(self.row_counts, side.widths, strict=True)),), like)
        return flat, self._cut(flat, side.widths)

    def _cut(self, flat: Tensor, widths: list[int]) -> list[Tensor]:
        shapes = list(zip(self.row_counts, widths, strict=True))
        return [part.view(s) for part, s in zip(flat.split([r * w for r, w in shapes]), shapes, strict=True)]

    def split(self, side: Side, values: Tensor) -> list[Tensor]:
        """Matrices of the groups, from values packed by group or from rows in their order."""
        if side.by_group or self.count == 1:
            return self._cut(values.reshape(-1), side.widths)
        values = values.reshape(sum(self.row_counts), side.widths[0])
        _, matrices = self.new(side, values)
        for rows, matrix in zip(self.rows, matrices, strict=True):
            take(values, rows, Units.every(values.shape[1]), out=matrix)
        return matrices

    def join(self, side: Side, flat: Tensor, matrices: list[Tensor]) -> Tensor:
        """Inverse of :meth:`split`."""
        if side.by_group or self.count == 1:
            return flat
        values = buffer((sum(self.row_counts), side.widths[0]), flat)
        for rows, matrix in zip(self.rows, matrices, strict=True):
            put(values, rows, Units.every(values.shape[1]), matrix, clear=False)
        return values

    def weights(self, weight: Tensor) -> list[Tensor]:
        """The block of the weight that each group multiplies, ``[kept outputs, kept inputs]``."""
        inside, outside = self.inside, self.outside
        if inside.pattern is None and outside.pattern is None:
            return [weight]
        if self.overlaps:
            covered = take(weight, outside.covered, inside.covered)
            return [covered[o, i] for o, i in zip(outside.places, inside.places, strict=True)]
        shapes = list(zip(outside.widths, inside.widths, strict=True))
        blocks: list[Tensor | None] = [None] * self.count
        if self.count > 1 and len(set(shapes)) == 1:
            blocks = list(buffer((self.count, *shapes[0]), weight))  # one buffer: then the product is batched
        return [take(weight, outside.units[g], inside.units[g], blocks[g]) for g in range(self.count)]

    def weight_grad(self, dys: list[Tensor], xs: list[Tensor]) -> Tensor:
        """Dense gradient; each entry is written once, but for those that groups have in common: they add up."""
        inside, outside = self.inside, self.outside
        grad = buffer((outside.n, inside.n), dys[0])
        if inside.pattern is None and outside.pattern is None:
            return torch.mm(dys[0].t(), xs[0], out=grad)
        if self.overlaps:
            covered = buffer((outside.covered.count, inside.covered.count), grad).zero_()
            for dy, x, o, i in zip(dys, xs, outside.places, inside.places, strict=True):
                covered[o, i].addmm_(dy.t(), x)
            put(grad, outside.covered, inside.covered, covered, clear=inside.covered.count < inside.n)
        else:
            # Where all groups write the same rows, the first one clears what none of them writes.
            gaps = not inside.by_group or inside.covered.count < inside.n
            for g, (dy, x) in enumerate(zip(dys, xs, strict=True)):
                blank = inside.pattern is not None and (outside.by_group or (g == 0 and gaps))
                block = torch.mm(dy.t(), x, out=buffer((dy.shape[1], x.shape[1]), grad))
                put(grad, outside.units[g], inside.units[g], block, clear=blank)
        if outside.pattern is not None:
            clear(grad, outside.pattern.never_kept)
        return grad

    def add_bias(self, ys: list[Tensor], bias: Tensor) -> None:
        """Add the bias of each group's units, in place."""
        side = self.outside
        if side.pattern is not None:
            bias = take(bias[None], _ONE, side.covered)[0]
        for place, y in zip(side.places, ys, strict=True):
            y += bias[place]

    def bias_grad(self, dys: list[Tensor]) -> Tensor:
        """Dense gradient: sums over the rows of each group."""
        side = self.outside
        covered = dys[0].new_zeros(1, side.covered.count)
        for place, dy in zip(side.places, dys, strict=True):
            covered[:, place] += dy.sum(0)
        if side.pattern is None:
            return covered[0]
        grad = dys[0].new_zeros(1, side.n)
        put(grad, _ONE, side.covered, covered, clear=False)
        return grad[0]


_ONE = Units.every(1)


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """Kept values of a dense ``[*leading, n]``: flat, group after group."""
    rows = pattern.row_groups(tuple(x.shape[:-1]))
    matrix = x.reshape(-1, pattern.n)
    sizes = [r.count * pattern.units(g).count for g, r in enumerate(rows)]
    flat = buffer((sum(sizes),), x)
    for g, (r, part) in enumerate(zip(rows, flat.split(sizes), strict=True)):
        take(matrix, r, pattern.units(g), out=part.view(r.count, pattern.units(g).count))
    return flat


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """Inverse of :func:`pack`, with zeros where the pattern drops."""
    rows = pattern.row_groups(leading_shape)
    sizes = [r.count * pattern.units(g).count for g, r in enumerate(rows)]
    dense = buffer((*leading_shape, pattern.n), values)
    for g, (r, part) in enumerate(zip(rows, values.reshape(-1).split(sizes), strict=True)):
        put(dense.view(-1, pattern.n), r, pattern.units(g), part.view(r.count, pattern.units(g).count), clear=True)
    return dense
