"""Gather and scatter of submatrices, given by selected rows and columns of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.library import library
from approxdrop_lightning.patterns.units import Units, UnitsStruct

#: Size in bytes above which a result, such as a gradient, has left the caches before it is read.
_LARGE = 1 << 20


def is_large(matrix: Tensor) -> bool:
    """Whether a matrix is so large that it leaves the caches before it is read."""
    return matrix.nbytes > _LARGE


def take(matrix: Tensor, rows: Units, columns: Units, out: Tensor | None = None) -> Tensor:
    """``matrix[rows][:, columns]``, contiguous.

    Args:
        matrix: ``[n, m]``.
        rows: Rows to take.
        columns: Columns to take.
        out: Contiguous ``[rows.count, columns.count]`` to write to; None to allocate.

    Returns:
        ``out``.
    """
    out = buffer((rows.count, columns.count), matrix) if out is None else out
    if out.numel() == 0:
        return out
    native = library()
    if native is not None and matrix.is_cpu and (matrix.stride(1) == 1 or matrix.shape[1] == 1):
        native.take(*_places(out, matrix, matrix.stride(0), rows, columns))
        return out
    there, matrix = matrix.device, sliced(matrix, rows, columns)
    if rows.slice and columns.slice:
        return out.copy_(matrix)
    if rows.slice:
        return torch.index_select(matrix, 1, columns.on(there), out=out)
    if columns.slice:
        return torch.index_select(matrix, 0, rows.on(there), out=out)
    index = torch.ops.aten.index.Tensor_out
    return index(matrix, [rows.on(there)[:, None], columns.on(there)], out=out)


def sliced(matrix: Tensor, rows: Units, columns: Units) -> Tensor:
    """View of ``matrix``, restricted to ``rows`` if they form a slice, and likewise to ``columns``."""
    whole = slice(None)
    return matrix[rows.slice or whole, columns.slice or whole]


def put(matrix: Tensor, rows: Units, columns: Units, values: Tensor, clear: bool) -> None:
    """Write ``matrix[rows][:, columns] = values`` in place.

    Args:
        matrix: Contiguous ``[n, m]``.
        rows: Rows to write.
        columns: Columns to write.
        values: ``[rows.count, columns.count]``.
        clear: Whether to zero all other columns of these rows.
    """
    if rows.count == 0 or matrix.numel() == 0:
        return
    values = values.contiguous()
    native = library()
    if native is not None and matrix.is_cpu:
        native.put(*_places(matrix, values, columns.count, rows, columns), clear)
        return
    if clear and not columns.is_all(matrix.shape[1]):
        zero(matrix, rows, Units.every(matrix.shape[1]))
    if not columns.count:
        return
    there, view = matrix.device, sliced(matrix, rows, columns)
    if rows.slice and columns.slice:
        view.copy_(values)
    elif rows.slice:  # scatter_ along a row is twice as fast as index_copy_
        view.scatter_(1, columns.on(there).expand(values.shape), values)
    elif columns.slice:
        view.index_copy_(0, rows.on(there), values)
    else:
        view.index_put_((rows.on(there)[:, None], columns.on(there)), values)


def zero(matrix: Tensor, rows: Units, columns: Units) -> None:
    """Write ``matrix[rows][:, columns] = 0`` in place; the matrix must be contiguous."""
    if rows.count == 0 or columns.count == 0:
        return
    native = library()
    if native is not None and matrix.is_cpu:
        item, places = matrix.element_size(), (rows.struct, columns.struct)
        size = rows.count * columns.count
        threads = torch.get_num_threads()
        native.zero(matrix.data_ptr(), matrix.stride(0) * item, *places, item, size, threads, is_large(matrix))
        return
    there, view = matrix.device, sliced(matrix, rows, columns)
    if rows.slice and columns.slice:
        view.zero_()
    elif rows.slice or columns.slice:
        dim, units = (1, columns) if rows.slice else (0, rows)
        view.index_fill_(dim, units.on(there), 0)
    else:
        view[rows.on(there)[:, None], columns.on(there)] = 0


def _places(to: Tensor, source: Tensor, stride: int, rows: Units, columns: Units) -> tuple[int | UnitsStruct, ...]:
    """The arguments that all compiled copies have in common."""
    item, width = to.element_size(), to.shape[1]
    return (
        to.data_ptr(), width * item, source.data_ptr(), stride * item, rows.struct, columns.struct,
        item, rows.count * width, torch.get_num_threads(),
    )  # fmt: skip
