"""What each group of rows reads and writes of inputs, outputs and weight.

Packed values are flat, group after group, each group a row-major matrix ``[rows of the group, kept units of
the group]``. Elementwise functions need not know; the groups need not be of one size; and what one layer
packs the next one reads without a copy.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.copies import put, take, zero
from approxdrop_lightning.ops.native.product import Block, Product, multiply, native_for
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.units import Units


class Side:
    """The inputs or the outputs of a layer: which units each group reads or writes, and where its values lie.

    Args:
        pattern: What is kept; None for everything.
        n: Number of units.
        rows: Rows of each group.
    """

    def __init__(self, pattern: RowPattern | None, n: int, rows: tuple[Units, ...]) -> None:
        #: That of the first order: its groups write the weight's gradient, those of further orders add to it.
        self.pattern = None if pattern is None else pattern.parts[0]
        self.n, self.rows = n, rows
        #: Whether values are packed by group; else they are rows in their order.
        self.by_group = pattern is not None and pattern.n_groups > 1
        every = Units.every(n)
        self.units = [every if pattern is None else pattern.units(g % pattern.n_groups) for g in range(len(rows))]
        self.overlaps = pattern is not None and pattern.overlaps

    def new(self, like: Tensor) -> Tensor:
        """Uninitialised values: flat if packed by group, else ``[rows, units]``."""
        counts = [r.count for r in self.rows]
        if self.by_group:
            return buffer((sum(r * u.count for r, u in zip(counts, self.units, strict=True)),), like)
        shape = (sum(counts), self.units[0].count)
        # What is dense others read and free, as the logits of a large vocabulary: kept, it would be held twice.
        return like.new_empty(shape) if self.pattern is None else buffer(shape, like)

    def blocks(self, values: Tensor) -> list[Block]:
        """Where in the values those of each group lie, ``[rows of the group, its units]``."""
        if not self.by_group:
            values = values.reshape(sum(r.count for r in self.rows), self.units[0].count)
            columns = Units.every(values.shape[1])
            return [Block(values, rows, columns) for rows in self.rows]
        values, found, offset = values.reshape(-1).contiguous(), [], 0
        for rows, units in zip(self.rows, self.units, strict=True):
            found.append(Block.whole(values, (rows.count, units.count), offset))
            offset += rows.count * units.count
        return found

    def dropped(self, group: int) -> Units:
        """Units that a group does not keep."""
        assert self.pattern is not None
        return self.pattern.dropped(group)

    def pieces(self, group: int) -> list[tuple[slice, Units, bool]]:
        """Units of a group in pieces: where among its own, which, and whether groups before it keep them too."""
        if self.pattern is None or not self.overlaps or group == 0:
            return [(slice(None), self.units[group], not self.by_group)]
        common, own = self.pattern.common, self.pattern.dropped(0)
        return [(slice(common.count), common, True), (slice(common.count, None), own, False)]


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
        n_out, n_in = weight.shape
        rows = (grouped or RowPattern(1, 1, 0)).row_groups(leading_shape)
        self.inside = Side(in_pattern, n_in, rows)
        #: Number of groups of each order of the units.
        self.of_one_order = len(rows) // (1 if grouped is None else grouped.n_orders)
        self.outside = Side(out_pattern, n_out, rows)

    def weights(self, weight: Tensor) -> list[Block]:
        """The block of the weight that each group multiplies, ``[its outputs, its inputs]``."""
        return [Block(weight, o, i) for o, i in zip(self.outside.units, self.inside.units, strict=True)]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` of each group."""
        y = self.outside.new(x)
        blocks = zip(self.inside.blocks(x), self.weights(weight), self.outside.blocks(y), strict=True)
        multiply([(x_g, w_g.t, y_g, False) for x_g, w_g, y_g in blocks], bias)
        return y

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """``dy @ weight`` of each group."""
        dx = self.inside.new(dy)
        blocks = zip(self.outside.blocks(dy), self.weights(weight), self.inside.blocks(dx), strict=True)
        multiply([(dy_g, w_g, dx_g, False) for dy_g, w_g, dx_g in blocks])
        return dx

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        """Dense gradient; each entry is written once, but for those that groups have in common: they add up."""
        dys, xs = self.outside.blocks(dy), self.inside.blocks(x)
        grad = buffer((self.outside.n, self.inside.n), dy, exact=True)
        cleared = self._clear(grad)
        first: list[Product] = []
        later: list[Product] = []
        for g, (dy_g, x_g) in enumerate(zip(dys, xs, strict=True)):
            if g == 0 or cleared or g >= self.of_one_order:
                out = Block(grad, self.outside.units[g], self.inside.units[g])
                (later if g else first).append((dy_g.t, x_g, out, g > 0))
                continue
            for place, rows, again in self.outside.pieces(g):
                # Rows that no group has written yet: nothing to add to.
                for columns in self.inside.pieces(g) if again else [(slice(None), self.inside.units[g], False)]:
                    add = again and columns[2]
                    product = (dy_g.cut(place).t, x_g.cut(columns[0]), Block(grad, rows, columns[1]), add)
                    (later if add else first).append(product)
        multiply(first, past_caches=not later)
        if self.inside.overlaps or self.outside.overlaps or cleared:
            for product in later:
                multiply([product])
            return grad
        for start in range(0, len(later), self.of_one_order):
            multiply(later[start : start + self.of_one_order])
        return grad

    def _clear(self, grad: Tensor) -> bool:
        """Zero what no group writes; returns whether everything was zeroed, which is so where that is simplest."""
        inside, outside = self.inside, self.outside
        both = inside.pattern is not None and outside.pattern is not None
        if both and (inside.by_group, inside.overlaps) != (outside.by_group, outside.overlaps):
            grad.zero_()
            return True
        if not grad.is_cpu:  # where one call costs more than what it writes
            grad.zero_()
            return False
        if outside.pattern is not None:
            never = outside.pattern.never_kept if outside.by_group else outside.dropped(0)
            zero(grad, never, Units.every(inside.n))
        if inside.pattern is None:
            return False
        if not inside.by_group:
            zero(grad, outside.units[0], Units.every(inside.n))
        elif outside.pattern is None:
            zero(grad, outside.units[0], inside.pattern.never_kept)
        else:
            for g, rows in enumerate(outside.units[: self.of_one_order]):
                zero(grad, outside.dropped(1 - g) if outside.overlaps else rows, inside.dropped(g))
        return False

    def bias_grad(self, dy: Tensor) -> Tensor:
        """Dense gradient: sums over the rows of each group."""
        outside = self.outside
        if outside.pattern is None:
            return dy.reshape(-1, outside.n).sum(0)
        grad = dy.new_zeros(outside.n)
        native = native_for([dy])
        if native is None:
            for block, units in zip(outside.blocks(dy), outside.units, strict=True):
                grad.index_add_(0, units.on(dy.device), block.copied().sum(0))
            return grad
        described = array("q")
        for rows, units in zip(outside.rows, outside.units, strict=True):
            described.extend((rows.count, units.count, *units.runs))
        values, places = dy.contiguous(), described.buffer_info()[0]
        native.column_sums(values.data_ptr(), places, len(outside.rows), grad.data_ptr(), torch.get_num_threads())
        return grad


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
    dense = buffer((*leading_shape, pattern.n), values, exact=True)
    for g, (r, part) in enumerate(zip(rows, values.reshape(-1).split(sizes), strict=True)):
        put(dense.view(-1, pattern.n), r, pattern.units(g), part.view(r.count, pattern.units(g).count), clear=True)
    return dense
