"""The one primitive of the compact backend: products of parts of matrices, read and written where they lie."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from ctypes import CDLL

import torch
from torch import Tensor

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.copies import is_large, put, sliced, take
from approxdrop_lightning.ops.native.library import library
from approxdrop_lightning.patterns.units import Units


class Block:
    """``matrix[rows][:, columns]``, not copied.

    The matrix may be a part of a larger tensor: a view of it is made only where PyTorch's own calls need one, for it
    takes longer than all the rest.

    Args:
        tensor: Where the matrix lies.
        rows: Some of its rows, in an order.
        columns: Some of its columns, in an order.
        shape: Of the matrix; that of the tensor if not given.
        strides: Of the matrix, likewise.
        offset: Of the matrix's first entry from the tensor's, in entries.
    """

    __slots__ = ("columns", "offset", "rows", "shape", "strides", "tensor")

    def __init__(
        self,
        tensor: Tensor,
        rows: Units,
        columns: Units,
        shape: tuple[int, ...] | None = None,
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
    ) -> None:
        self.tensor, self.rows, self.columns, self.offset = tensor, rows, columns, offset
        self.shape, self.strides = shape or tensor.shape, strides or tensor.stride()

    @staticmethod
    def whole(tensor: Tensor, shape: tuple[int, int] | None = None, offset: int = 0) -> Block:
        """All of a matrix; with a shape, a row-major one that lies somewhere in a contiguous tensor."""
        n, m = shape or tensor.shape
        return Block(tensor, Units.every(n), Units.every(m), shape, shape and (m, 1), offset)

    @property
    def t(self) -> Block:
        """Transposed."""
        return Block(self.tensor, self.columns, self.rows, self.shape[::-1], self.strides[::-1], self.offset)

    def cut(self, columns: slice) -> Block:
        """Some of the columns of a block that has all of its matrix."""
        start, stop, _ = columns.indices(self.shape[1])
        shape = (self.shape[0], stop - start)
        return Block(self.tensor, self.rows, Units.every(shape[1]), shape, self.strides, self.offset + start)

    @property
    def matrix(self) -> Tensor:
        """The matrix that it is a block of."""
        return self.tensor.as_strided(self.shape, self.strides, self.tensor.storage_offset() + self.offset)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the matrix, in its order."""
        return self.rows.is_all(self.shape[0]) and self.columns.is_all(self.shape[1])

    def copied(self) -> Tensor:
        """``[rows, columns]``: a view of the matrix if a product can read it."""
        if self.is_whole:
            return self.matrix
        if (
            self.rows.slice
            and self.columns.slice
            and 1 in (view := sliced(self.matrix, self.rows, self.columns)).stride()
        ):
            return view
        if self.strides[1] != 1 and self.strides[0] == 1:
            return take(self.matrix.t(), self.columns, self.rows).t()
        return take(self.matrix, self.rows, self.columns)


#: ``out = a @ b``, or ``out += a @ b`` if the last entry says so.
Product = tuple[Block, Block, Block, bool]


def multiply(products: Sequence[Product], bias: Tensor | None = None, past_caches: bool = False) -> None:
    """``out = a @ b + bias`` in place, or ``out += a @ b + bias``, for each of some products.

    In float32 on the CPU one compiled function reads and writes all blocks where they lie; elsewhere they are copied.

    Args:
        products: ``(a, b, out, add)`` with blocks ``[M, K]``, ``[K, N]`` and ``[M, N]`` of row-major matrices. What
            else is in the matrices of ``out`` stays. No product reads or writes what another one writes.
        bias: One entry for each column of ``b``'s matrix; None for none.
        past_caches: Whether what is written is not read soon, as a gradient: it goes past the caches if it is large.
    """
    bias = None if bias is None else bias.contiguous()
    tensors = [block.tensor for product in products for block in product[:3]]
    native = native_for(tensors if bias is None else [*tensors, bias])
    address = 0 if bias is None else bias.data_ptr()
    described = array("q")
    for a, b, out, add in products:
        if native is None or not a.columns.count:
            _by_copies(a, b, out, add, bias)
        elif out.rows.count and out.columns.count:
            described.extend(
                (
                    a.rows.count, a.columns.count, b.columns.count,
                    a.tensor.data_ptr() + 4 * a.offset, *a.strides, *a.rows.runs, *a.columns.runs,
                    b.tensor.data_ptr() + 4 * b.offset, *b.strides, *b.rows.runs, *b.columns.runs,
                    out.tensor.data_ptr() + 4 * out.offset, out.strides[0], *out.rows.runs, *out.columns.runs,
                    address, 1 if add else 2 * (past_caches and is_large(out.tensor)),
                )
            )  # fmt: skip
    if native is not None and described:
        native.products(described.buffer_info()[0], len(described) // _FIELDS, torch.get_num_threads())


#: Of ``Product`` in ``product.c``.
_FIELDS = 31


def native_for(tensors: list[Tensor]) -> CDLL | None:
    """Compiled code for these tensors, or None where PyTorch's own calls have to do."""
    # A dispatch mode (FlopCounterMode, for one) watches PyTorch's own calls: then these are what it shall see.
    if torch._C._len_torch_dispatch_stack() or not all(t.is_cpu and t.dtype == torch.float32 for t in tensors):
        return None
    return library()


def _by_copies(a: Block, b: Block, out: Block, add: bool, bias: Tensor | None) -> None:
    if not out.rows.count or not out.columns.count:
        return
    in_place = out.rows.slice is not None and out.columns.slice is not None
    if in_place:
        values = sliced(out.matrix, out.rows, out.columns)
    else:
        values = out.copied() if add else buffer((out.rows.count, out.columns.count), out.tensor)
    if add:
        torch.addmm(values, a.copied(), b.copied(), out=values)
    else:
        torch.mm(a.copied(), b.copied(), out=values)
    if bias is not None:
        values += bias if b.columns.is_all(len(bias)) else bias.index_select(0, b.columns.on(bias.device))
    if not in_place:
        put(out.matrix, out.rows, out.columns, values, clear=False)
