"""Products of a linear layer by groups of rows, and the layout of packed values.

Packed values are flat, group after group, each group being a row-major matrix ``[rows of the group, kept units of the
group]``. Elementwise functions apply to them unchanged, groups may differ in size, and the next layer reads a layer's
packed values without a copy.

In float32 on the CPU, one call of compiled code (``grouped.c``) computes a product of all groups and reads and writes
all operands in place; otherwise PyTorch multiplies copies, group by group.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.copies import put, take
from approxdrop_lightning.ops.native.product import Submatrix, multiply, native_for
from approxdrop_lightning.patterns.row import RowPattern, row_groups, row_structs
from approxdrop_lightning.patterns.units import Units

#: Gradients of input, weight and bias.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
_relu_backward = torch.ops.aten.threshold_backward.default


class GroupedStruct(ctypes.Structure):
    """``Grouped`` of ``grouped.c``."""

    _fields_ = [
        ("inside", ctypes.c_void_p),
        ("outside", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
    ]


class GroupedUnits:
    """The inputs or outputs of a layer: the units that each group of rows keeps, and the location of its values.

    Args:
        pattern: Pattern of the units; None if all are kept.
        n: Number of units.
        leading_shape: Shape of the batch.
    """

    def __init__(self, pattern: RowPattern | None, n: int, leading_shape: tuple[int, ...]) -> None:
        self.pattern, self.n, self.leading_shape = pattern, n, leading_shape
        #: Whether values are packed by group; otherwise rows keep their order.
        self.by_group = pattern is not None and pattern.n_groups > 1
        #: ``[rows, units]``, if rows keep their order.
        self.shape = math.prod(leading_shape), n if pattern is None else pattern.n_kept

    def units(self, group: int) -> Units:
        """The units that a group keeps."""
        return Units.every(self.n) if self.pattern is None else self.pattern.units(group % self.pattern.n_groups)

    def new(self, like: Tensor) -> Tensor:
        """Uninitialised values: flat if packed by group, else ``[rows, units]``."""
        if self.pattern is not None and self.by_group:
            return buffer((self.pattern.n_packed(self.leading_shape),), like)
        # Readers free dense values, such as the logits of a large vocabulary; a pool would hold them twice.
        return like.new_empty(self.shape) if self.pattern is None else buffer(self.shape, like)

    def matrix(self, values: Tensor) -> Tensor:
        """The values as ``[rows, units]``, or flat and contiguous if they are packed by group."""
        return values.reshape(-1).contiguous() if self.by_group else values.reshape(self.shape)

    def submatrices(self, values: Tensor, rows: tuple[Units, ...]) -> list[Submatrix]:
        """The submatrix ``[rows of the group, units of the group]`` of each group within the values."""
        values, found, offset = self.matrix(values), [], 0
        for group, own in enumerate(rows):
            if not self.by_group:
                found.append(Submatrix(values, own, Units.every(self.shape[1])))
                continue
            shape = own.count, self.units(group).count
            found.append(Submatrix.whole(values, shape, offset))
            offset += math.prod(shape)
        return found


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
        n_out, n_in = weight.shape
        self.inputs = GroupedUnits(in_pattern, n_in, leading_shape)
        self.outputs = GroupedUnits(out_pattern, n_out, leading_shape)
        self.leading_shape = leading_shape
        grouped = in_pattern if self.inputs.by_group else out_pattern if self.outputs.by_group else None
        self.n_groups = 1 if grouped is None else grouped.n_groups

    @property
    def rows(self) -> tuple[Units, ...]:
        """Rows of each group."""
        return row_groups(self.leading_shape, self.n_groups)

    @cached_property
    def _address(self) -> int:
        """Address of what compiled code is told of the layer, which lives as long as this object."""
        patterns = [None if side.pattern is None else side.pattern.address for side in (self.inputs, self.outputs)]
        rows = row_structs(self.leading_shape, self.n_groups)
        struct = GroupedStruct(*patterns, self.inputs.n, self.outputs.n, ctypes.addressof(rows), self.n_groups)
        self._alive = rows, struct
        return ctypes.addressof(struct)

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, scale: float = 1.0
    ) -> Tensor:
        """``x @ weight.T + bias`` for each group, scaled, after a ReLU if asked for."""
        y = self.outputs.new(x)
        native = native_for((x, weight) if bias is None else (x, weight, bias))
        if native is not None:
            x, bias = self.inputs.matrix(x), None if bias is None else bias.contiguous()
            native.grouped_product(
                self._address, *_place(x), *_place(weight),
                None if bias is None else bias.data_ptr(), y.data_ptr(), scale, relu, torch.get_num_threads(),
            )  # fmt: skip
            return y
        for x_g, w_g, y_g in self._operands(x, weight, y):
            multiply([(x_g, w_g.t, y_g, False)], bias)
        return activate(y, relu, scale)

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """``dy @ weight`` for each group."""
        dx = self.inputs.new(dy)
        native = native_for((dy, weight))
        if native is not None:
            dy = self.outputs.matrix(dy)
            native.grouped_input_grad(
                self._address, *_place(dy), *_place(weight), dx.data_ptr(), torch.get_num_threads()
            )
            return dx
        for dx_g, w_g, dy_g in self._operands(dx, weight, dy):
            multiply([(dy_g, w_g, dx_g, False)])
        return dx

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        """Dense gradient: each entry is the sum over the groups that keep it."""
        grad = buffer((self.outputs.n, self.inputs.n), dy, exact=True)
        native = native_for((dy, x))
        if native is not None:
            dy, x = self.outputs.matrix(dy), self.inputs.matrix(x)
            native.grouped_weight_grad(
                self._address, *_place(dy), *_place(x), grad.data_ptr(), torch.get_num_threads()
            )
            return grad
        grad.zero_()
        for group, (x_g, grad_g, dy_g) in enumerate(self._operands(x, grad, dy)):
            multiply([(dy_g.t, x_g, grad_g, group >= self._n_disjoint)])
        return grad

    @property
    def _n_disjoint(self) -> int:
        """Number of groups of which no two keep an entry of the weight in common."""
        by_group = (side.pattern for side in (self.inputs, self.outputs) if side.by_group)
        return max((p.n_groups // p.n_orders for p in by_group if p is not None and not p.overlaps), default=1)

    def bias_grad(self, dy: Tensor) -> Tensor:
        """Dense gradient, summed over the rows of each group."""
        outputs = self.outputs
        if outputs.pattern is None:
            return dy.reshape(-1, outputs.n).sum(0)
        native = native_for((dy,))
        if native is not None:
            grad, dy = dy.new_empty(outputs.n), dy.contiguous()
            native.grouped_bias_grad(self._address, dy.data_ptr(), grad.data_ptr(), torch.get_num_threads())
            return grad
        grad = dy.new_zeros(outputs.n)
        for group, dy_g in enumerate(outputs.submatrices(dy, self.rows)):
            grad.index_add_(0, outputs.units(group).on(dy.device), dy_g.contiguous().sum(0))
        return grad

    def gradients(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        wanted: Sequence[bool],
        y: Tensor | None = None,
        scale: float = 1.0,
    ) -> Gradients:
        """Gradients of input, weight and bias, as far as they are wanted.

        Args:
            dy: Gradient of the outputs.
            x: Inputs.
            weight: ``[n_out, n_in]``.
            wanted: Which of the three are.
            y: Outputs, if :meth:`product` applied a ReLU.
            scale: Factor that it applied.
        """
        native = native_for((dy, x, weight))
        if native is None:
            return self.each_gradient(dy, x, weight, wanted, y, scale)
        by_torch = self.outputs.pattern is None
        db = dy.new_empty(self.outputs.n) if wanted[2] and not by_torch else None
        dx = self.inputs.new(dy) if wanted[0] else None
        dw = buffer((self.outputs.n, self.inputs.n), dy, exact=True) if wanted[1] else None
        dy, read, scaled = self.outputs.matrix(dy), self.inputs.matrix(x), None
        if y is not None or scale != 1:
            scaled = buffer(tuple(dy.shape), dy)
        if scaled is not None or db is not None:
            dy = dy.contiguous()
        native.grouped_gradients(
            self._address, *_place(dy), _address(y), _address(scaled), dy.numel(), scale, *_place(read),
            *_place(weight), _address(dx), _address(dw), _address(db), torch.get_num_threads(),
        )  # fmt: skip
        if wanted[2] and by_torch:
            db = self.bias_grad(dy if scaled is None else scaled)
        return None if dx is None else dx.view(x.shape), dw, db

    def each_gradient(
        self, dy: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], y: Tensor | None, scale: float
    ) -> Gradients:
        """:meth:`gradients`, one after the other."""
        if scale != 1:
            dy = dy * scale
        if y is not None:
            dy = _relu_backward(dy, y.view(dy.shape), 0)
        return (
            self.input_grad(dy, weight).view(x.shape) if wanted[0] else None,
            self.weight_grad(dy, x) if wanted[1] else None,
            self.bias_grad(dy) if wanted[2] else None,
        )

    def _operands(self, x: Tensor, weight: Tensor, y: Tensor) -> list[tuple[Submatrix, Submatrix, Submatrix]]:
        """Inputs, the submatrix of the weight ``[its outputs, its inputs]``, and outputs of each group."""
        rows, inputs, outputs = self.rows, self.inputs, self.outputs
        weights = [Submatrix(weight, outputs.units(g), inputs.units(g)) for g in range(len(rows))]
        return list(zip(inputs.submatrices(x, rows), weights, outputs.submatrices(y, rows), strict=True))


def activate(y: Tensor, relu: bool, scale: float) -> Tensor:
    """``scale * relu(y)``, in place."""
    if relu:
        y.relu_()
    return y if scale == 1 else y.mul_(scale)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _place(matrix: Tensor) -> tuple[int, ...]:
    """Address and strides of a matrix, or of flat values, whose strides follow from their groups."""
    return (matrix.data_ptr(), 0, 0) if matrix.dim() == 1 else (matrix.data_ptr(), *matrix.stride())


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
