"""Products of a linear layer by groups of rows, and the layout of packed values.

Packed values are flat, group after group, each group being a row-major matrix ``[rows of the group, kept units of the
group]``. Elementwise functions apply to them unchanged, groups may differ in size, and the next layer reads a layer's
packed values without a copy.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.copies import put, take, zero
from approxdrop_lightning.ops.native.product import Product, Submatrix, multiply, native_for
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.units import Units, UnitsStruct


class RowGroupStruct(ctypes.Structure):
    """``RowGroup`` of ``copies.c``."""

    _fields_ = [("rows", ctypes.c_int64), ("columns", UnitsStruct)]


class GroupedUnits:
    """The inputs or outputs of a layer: the units that each group of rows keeps, and the location of its values.

    Args:
        pattern: Pattern of the units; None if all are kept.
        n: Number of units.
        rows: Rows of each group.
    """

    def __init__(self, pattern: RowPattern | None, n: int, rows: tuple[Units, ...]) -> None:
        #: Pattern of the first order, whose groups write the weight's gradient; those of further orders accumulate.
        self.pattern = None if pattern is None else pattern.by_order[0]
        self.n, self.rows = n, rows
        #: Whether values are packed by group; otherwise rows keep their order.
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
        # Readers free dense values, such as the logits of a large vocabulary; a pool would hold them twice.
        return like.new_empty(shape) if self.pattern is None else buffer(shape, like)

    def submatrices(self, values: Tensor) -> list[Submatrix]:
        """The submatrix ``[rows of the group, units of the group]`` of each group within the values."""
        if not self.by_group:
            values = values.reshape(sum(r.count for r in self.rows), self.units[0].count)
            columns = Units.every(values.shape[1])
            return [Submatrix(values, rows, columns) for rows in self.rows]
        values, found, offset = values.reshape(-1).contiguous(), [], 0
        for rows, units in zip(self.rows, self.units, strict=True):
            found.append(Submatrix.whole(values, (rows.count, units.count), offset))
            offset += rows.count * units.count
        return found

    def dropped(self, group: int) -> Units:
        """The units that a group drops."""
        assert self.pattern is not None
        return self.pattern.dropped(group)

    def split_by_overlap(self, group: int) -> list[tuple[slice, Units, bool]]:
        """Split a group's units by whether an earlier group keeps them as well.

        Returns:
            Up to two entries: the positions of the units among the group's own, the units, and whether an earlier
            group keeps them.
        """
        if self.pattern is None or not self.overlaps or group == 0:
            return [(slice(None), self.units[group], not self.by_group)]
        common, own = self.pattern.common, self.pattern.dropped(0)
        return [(slice(common.count), common, True), (slice(common.count, None), own, False)]


class GroupedLinear:
    """A linear layer computed by groups of rows; all rows form one group if no pattern is interleaved.

    Args:
        in_pattern: Pattern of the inputs; None if all are read.
        out_pattern: Pattern of the outputs; None if all are computed.
        leading_shape: Shape of the batch.
        weight: ``[n_out, n_in]``; only its shape is used.
    """

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
        self.inputs = GroupedUnits(in_pattern, n_in, rows)
        self.outputs = GroupedUnits(out_pattern, n_out, rows)
        #: Number of groups of each order of the units.
        self.groups_per_order = len(rows) // (1 if grouped is None else grouped.n_orders)

    def weights(self, weight: Tensor) -> list[Submatrix]:
        """The submatrix of the weight that each group uses, ``[its outputs, its inputs]``."""
        return [Submatrix(weight, o, i) for o, i in zip(self.outputs.units, self.inputs.units, strict=True)]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` for each group."""
        y = self.outputs.new(x)
        operands = zip(self.inputs.submatrices(x), self.weights(weight), self.outputs.submatrices(y), strict=True)
        multiply([(x_g, w_g.t, y_g, False) for x_g, w_g, y_g in operands], bias)
        return y

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """``dy @ weight`` for each group."""
        dx = self.inputs.new(dy)
        operands = zip(self.outputs.submatrices(dy), self.weights(weight), self.inputs.submatrices(dx), strict=True)
        multiply([(dy_g, w_g, dx_g, False) for dy_g, w_g, dx_g in operands])
        return dx

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        """Dense gradient. Each entry is written once, except that the products of groups that share it are summed."""
        dys, xs = self.outputs.submatrices(dy), self.inputs.submatrices(x)
        grad = buffer((self.outputs.n, self.inputs.n), dy, exact=True)
        cleared = self._clear(grad)
        first: list[Product] = []
        later: list[Product] = []
        for g, (dy_g, x_g) in enumerate(zip(dys, xs, strict=True)):
            if g == 0 or cleared or g >= self.groups_per_order:
                out = Submatrix(grad, self.outputs.units[g], self.inputs.units[g])
                (later if g else first).append((dy_g.t, x_g, out, g > 0))
                continue
            for place, rows, again in self.outputs.split_by_overlap(g):
                # Rows that no group has written yet are overwritten rather than added to.
                whole = [(slice(None), self.inputs.units[g], False)]
                for columns in self.inputs.split_by_overlap(g) if again else whole:
                    add = again and columns[2]
                    out = Submatrix(grad, rows, columns[1])
                    (later if add else first).append((dy_g.narrow(place).t, x_g.narrow(columns[0]), out, add))
        multiply(first, past_caches=not later)
        if self.inputs.overlaps or self.outputs.overlaps or cleared:
            for product in later:
                multiply([product])
            return grad
        for start in range(0, len(later), self.groups_per_order):
            multiply(later[start : start + self.groups_per_order])
        return grad

    def _clear(self, grad: Tensor) -> bool:
        """Zero the entries that no group writes.

        Returns:
            Whether the whole of ``grad`` was zeroed, where that is simplest.
        """
        inputs, outputs = self.inputs, self.outputs
        both = inputs.pattern is not None and outputs.pattern is not None
        if both and (inputs.by_group, inputs.overlaps) != (outputs.by_group, outputs.overlaps):
            grad.zero_()
            return True
        if not grad.is_cpu:  # a call costs more than the extra writes
            grad.zero_()
            return False
        if outputs.pattern is not None:
            never = outputs.pattern.never_kept if outputs.by_group else outputs.dropped(0)
            zero(grad, never, Units.every(inputs.n))
        if inputs.pattern is None:
            return False
        if not inputs.by_group:
            zero(grad, outputs.units[0], Units.every(inputs.n))
        elif outputs.pattern is None:
            zero(grad, outputs.units[0], inputs.pattern.never_kept)
        else:
            for g, rows in enumerate(outputs.units[: self.groups_per_order]):
                zero(grad, outputs.dropped(1 - g) if outputs.overlaps else rows, inputs.dropped(g))
        return False

    def bias_grad(self, dy: Tensor) -> Tensor:
        """Dense gradient, summed over the rows of each group."""
        outputs = self.outputs
        if outputs.pattern is None:
            return dy.reshape(-1, outputs.n).sum(0)
        grad = dy.new_zeros(outputs.n)
        native = native_for([dy])
        if native is None:
            for dy_g, units in zip(outputs.submatrices(dy), outputs.units, strict=True):
                grad.index_add_(0, units.on(dy.device), dy_g.contiguous().sum(0))
            return grad
        values = dy.contiguous()
        groups = [RowGroupStruct(r.count, u.struct) for r, u in zip(outputs.rows, outputs.units, strict=True)]
        described = (RowGroupStruct * len(groups))(*groups)
        native.column_sums(values.data_ptr(), described, len(groups), grad.data_ptr(), torch.get_num_threads())
        return grad


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """See :meth:`.RowLinearBackend.pack`."""
    rows = pattern.row_groups(tuple(x.shape[:-1]))
    matrix = x.reshape(-1, pattern.n)
    sizes = [r.count * pattern.units(g).count for g, r in enumerate(rows)]
    flat = buffer((sum(sizes),), x)
    for g, (r, values_g) in enumerate(zip(rows, flat.split(sizes), strict=True)):
        take(matrix, r, pattern.units(g), out=values_g.view(r.count, pattern.units(g).count))
    return flat


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """See :meth:`.RowLinearBackend.unpack`."""
    rows = pattern.row_groups(leading_shape)
    sizes = [r.count * pattern.units(g).count for g, r in enumerate(rows)]
    dense = buffer((*leading_shape, pattern.n), values, exact=True)
    for g, (r, values_g) in enumerate(zip(rows, values.reshape(-1).split(sizes), strict=True)):
        put(
            dense.view(-1, pattern.n), r, pattern.units(g), values_g.view(r.count, pattern.units(g).count), clear=True
        )
    return dense
