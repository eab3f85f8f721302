"""Products of submatrices, read and written in place: the building block of the compact backend."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.copies import is_large, put, sliced, take
from approxdrop_lightning.ops.native.library import library
from approxdrop_lightning.patterns.units import Units, UnitsStruct

_WRITE, _ADD, _PAST_CACHES = range(3)  # modes of a product; must match product.c


class SubmatrixStruct(ctypes.Structure):
    """``Submatrix`` of ``product.c``."""

    _fields_ = [
        ("base", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("rows", UnitsStruct),
        ("columns", UnitsStruct),
    ]


class ProductStruct(ctypes.Structure):
    """``Product`` of ``product.c``."""

    _fields_ = [
        ("a", SubmatrixStruct),
        ("b", SubmatrixStruct),
        ("out", SubmatrixStruct),
        ("bias", ctypes.c_void_p),
        ("mode", ctypes.c_int64),
    ]


class Submatrix:
    """``matrix[rows][:, columns]`` without a copy.

    The matrix may be located anywhere in a larger tensor. A view of it is only created for PyTorch's own functions,
    because that takes longer than everything else here.

    Args:
        tensor: Tensor that contains the matrix.
        rows: Selected rows of the matrix.
        columns: Selected columns of the matrix.
        shape: Shape of the matrix; defaults to that of the tensor.
        strides: Strides of the matrix; defaults to those of the tensor.
        offset: Offset of the matrix's first entry from that of the tensor.
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
    def whole(tensor: Tensor, shape: tuple[int, int] | None = None, offset: int = 0) -> Submatrix:
        """A complete matrix: the tensor, or with ``shape`` a row-major one at an offset in a contiguous tensor."""
        n, m = shape or tensor.shape
        return Submatrix(tensor, Units.every(n), Units.every(m), shape, shape and (m, 1), offset)

    @property
    def t(self) -> Submatrix:
        """The transpose."""
        return Submatrix(self.tensor, self.columns, self.rows, self.shape[::-1], self.strides[::-1], self.offset)

    @property
    def matrix(self) -> Tensor:
        """View of the matrix from which rows and columns are selected."""
        return self.tensor.as_strided(self.shape, self.strides, self.tensor.storage_offset() + self.offset)

    @property
    def is_whole(self) -> bool:
        """Whether every row and column is selected, in natural order."""
        return self.rows.is_all(self.shape[0]) and self.columns.is_all(self.shape[1])

    @property
    def struct(self) -> SubmatrixStruct:
        """The submatrix in the form that compiled code reads; float32 only."""
        address = self.tensor.data_ptr() + 4 * self.offset
        return SubmatrixStruct(address, *self.strides, self.rows.struct, self.columns.struct)

    def contiguous(self) -> Tensor:
        """``[rows, columns]`` as an operand of a matrix product: a view if possible, otherwise a copy."""
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


#: ``out = a @ b``, or ``out += a @ b`` if the last entry is True.
Product = tuple[Submatrix, Submatrix, Submatrix, bool]


def multiply(products: Sequence[Product], bias: Tensor | None = None, past_caches: bool = False) -> None:
    """Compute several products ``out = a @ b + bias``, or ``out += a @ b + bias``, in place.

    In float32 on the CPU, one compiled function reads and writes all submatrices in place; otherwise PyTorch
    multiplies copies.

    Args:
        products: ``(a, b, out, add)`` with submatrices ``[M, K]``, ``[K, N]`` and ``[M, N]``. The matrix of ``out``
            is row-major, and its other entries are not modified. No product may read or write what another one
            writes.
        bias: One entry per column of ``b``'s matrix, or None.
        past_caches: Whether large results should bypass the caches because, like gradients, they are not read soon.
    """
    bias = None if bias is None else bias.contiguous()
    tensors = [operand.tensor for product in products for operand in product[:3]]
    native = native_for(tensors if bias is None else [*tensors, bias])
    address = None if bias is None else bias.data_ptr()
    structs = []
    for a, b, out, add in products:
        if native is None or not a.columns.count:
            _by_copies(a, b, out, add, bias)
        elif out.rows.count and out.columns.count:
            mode = _ADD if add else _PAST_CACHES if past_caches and is_large(out.tensor) else _WRITE
            structs.append(ProductStruct(a.struct, b.struct, out.struct, address, mode))
    if native is not None and structs:
        native.products((ProductStruct * len(structs))(*structs), len(structs), torch.get_num_threads())


def native_for(tensors: Sequence[Tensor]) -> ctypes.CDLL | None:
    """The compiled kernels if they support these tensors, otherwise None."""
    # Dispatch modes, such as FlopCounterMode, need to see PyTorch's own calls.
    if torch._C._len_torch_dispatch_stack() or not all(t.is_cpu and t.dtype == torch.float32 for t in tensors):
        return None
    return library()


def _by_copies(a: Submatrix, b: Submatrix, out: Submatrix, add: bool, bias: Tensor | None) -> None:
    if not out.rows.count or not out.columns.count:
        return
    in_place = out.rows.slice is not None and out.columns.slice is not None
    if in_place:
        values = sliced(out.matrix, out.rows, out.columns)
    else:
        values = out.contiguous() if add else buffer((out.rows.count, out.columns.count), out.tensor)
    if add:
        torch.addmm(values, a.contiguous(), b.contiguous(), out=values)
    else:
        torch.mm(a.contiguous(), b.contiguous(), out=values)
    if bias is not None:
        values += bias if b.columns.is_all(len(bias)) else bias.index_select(0, b.columns.on(bias.device))
    if not in_place:
        put(out.matrix, out.rows, out.columns, values, clear=False)
