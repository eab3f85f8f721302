"""Copies of blocks of a matrix: some rows and some columns, out of a large one or into it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from approxdrop_lightning.ops.native import library
from approxdrop_lightning.pattern import Units

#: Smaller buffers come from PyTorch: asking for them costs less than looking for one.
_KEEP_FROM_BYTES = 1 << 20
_kept = threading.local()


def buffer(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Uninitialised memory, if possible some that has been used before.

    On the CPU fresh memory costs a page fault per 4 KB, at each step; for a gradient that is more than what skipping
    saves. So large buffers are kept, and handed out again when nobody refers to their memory any more. Other
    devices have allocators that keep theirs.
    """
    size = like.element_size()
    for extent in shape:
        size *= extent
    if like.device.type != "cpu" or size < _KEEP_FROM_BYTES:
        return like.new_empty(shape)
    if not hasattr(_kept, "storages"):
        _kept.storages = {}
    storages = _kept.storages.setdefault(size, [])
    for storage in storages:
        if torch._C._storage_Use_Count(storage._cdata) == 1:  # ours only
            return torch.empty(0, dtype=like.dtype).set_(storage, 0, shape)
    with torch.inference_mode(False):
        fresh = like.new_empty(shape)
    storages.append(fresh.untyped_storage())
    return fresh


def free_buffers() -> None:
    """Give the memory back that :func:`buffer` keeps and nobody uses."""
    _kept.__dict__.clear()


def take(matrix: Tensor, rows: Tensor | None, columns: Units, out: Tensor | None = None) -> Tensor:
    """``matrix[rows][:, columns]``, contiguous.

    Args:
        matrix: ``[n, m]``.
        rows: Rows to take, int64; None for all.
        columns: Columns to take.
        out: Contiguous ``[len(rows), columns.count]`` to write to; may be a new one.

    Returns:
        ``out``.
    """
    height = matrix.shape[0] if rows is None else len(rows)
    out = buffer((height, columns.count), matrix) if out is None else out
    if out.numel() == 0:
        return out
    native = _native(matrix, out)
    if native is not None:
        rows = _every_row(height) if rows is None else rows
        item = matrix.element_size()
        native.take(
            out.data_ptr(), out.shape[1] * item, matrix.data_ptr(), matrix.stride(0) * item,
            rows.data_ptr(), height, columns.starts.data_ptr(), columns.lengths.data_ptr(), len(columns.starts), item,
            torch.get_num_threads(),
        )  # fmt: skip
        return out
    some = columns.count != matrix.shape[1] or len(columns.starts) > 1
    if rows is not None:
        matrix = torch.index_select(matrix, 0, rows.to(matrix.device), out=None if some else out)
    if some:
        return torch.index_select(matrix, 1, columns.index.to(matrix.device), out=out)
    return out if rows is not None else out.copy_(matrix)


def put(matrix: Tensor, rows: Tensor | None, columns: Units, values: Tensor, clear: bool) -> None:
    """``matrix[rows][:, columns] = values``, in place.

    Args:
        matrix: Contiguous ``[n, m]``.
        rows: Rows to write, int64; None for all.
        columns: Columns to write.
        values: ``[len(rows), columns.count]``.
        clear: Whether the other columns of these rows become zero.
    """
    height = matrix.shape[0] if rows is None else len(rows)
    if height == 0 or matrix.numel() == 0:
        return
    values = values.contiguous()
    native = _native(matrix, values)
    if native is not None:
        rows = _every_row(height) if rows is None else rows
        item = matrix.element_size()
        native.put(
            matrix.data_ptr(), matrix.shape[1] * item, values.data_ptr(), values.shape[1] * item,
            rows.data_ptr(), height, columns.starts.data_ptr(), columns.lengths.data_ptr(), len(columns.starts), item,
            clear, torch.get_num_threads(),
        )  # fmt: skip
        return
    rows = None if rows is None else rows.to(matrix.device)
    if columns.count == matrix.shape[1] and len(columns.starts) == 1:
        matrix.copy_(values) if rows is None else matrix.index_copy_(0, rows, values)
        return
    if rows is None:
        target = matrix.zero_() if clear else matrix
    else:
        target = matrix.new_zeros(height, matrix.shape[1]) if clear else matrix.index_select(0, rows)
    if columns.count:
        # scatter_ along a row is twice as fast as index_copy_
        target.scatter_(1, columns.index.to(matrix.device).expand(values.shape), values)
    if rows is not None:
        matrix.index_copy_(0, rows, target)


def _native(*tensors: Tensor):
    """The compiled kernels, if they serve these tensors."""
    if all(t.device.type == "cpu" and (t.stride(-1) == 1 or t.shape[-1] <= 1) for t in tensors):
        return library()
    return None


_rows: dict[int, Tensor] = {}


def _every_row(count: int) -> Tensor:
    if count not in _rows:
        if len(_rows) > 64:
            _rows.clear()
        _rows[count] = torch.arange(count)
    return _rows[count]
