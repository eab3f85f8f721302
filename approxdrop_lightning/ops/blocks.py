"""Copies of blocks of a matrix: some rows and some columns, out of a large one or into it."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.memory import to_device
from approxdrop_lightning.ops.native import Runs, library
from approxdrop_lightning.units import Units

#: Smaller buffers come from PyTorch: asking for them costs less than looking for one.
_KEEP_FROM_BYTES = 1 << 21
#: Bytes of what is not going to be read from a cache, as the gradient that the optimizer reads at the end of a step.
_LARGE = 1 << 20
#: A buffer that was not asked for during so many requests is given back.
_IDLE_REQUESTS = 1000


class _Pool(threading.local):
    """Storages by size, each with the number of the request that it served last."""

    def __init__(self) -> None:
        self.requests = 0
        self.storages: dict[int, list[list[Any]]] = {}

    def drop_idle(self) -> None:
        oldest = self.requests - _IDLE_REQUESTS
        for size, entries in list(self.storages.items()):
            self.storages[size] = [entry for entry in entries if entry[1] >= oldest]


_pool = _Pool()


def buffer(shape: tuple[int, ...], like: Tensor, exact: bool = False) -> Tensor:
    """Uninitialised memory, if possible some that has been used before.

    On the CPU fresh memory costs a page fault per 4 KB, at each step; for a gradient that is more than what skipping
    saves. So large buffers are kept, and handed out again when nobody refers to their memory any more. Other
    devices have allocators that keep theirs.

    Args:
        shape: Of the tensor.
        like: Gives device and type.
        exact: Whether the size is the same at each step, as that of a gradient is; else it is rounded up.
    """
    size = like.element_size() * math.prod(shape)
    if size < _KEEP_FROM_BYTES or not like.is_cpu:
        return like.new_empty(shape)
    if not exact:  # few sizes, not more than an eighth too large: what is kept differs a little from step to step
        step = 1 << (size.bit_length() - 4)
        size = -(-size // step) * step
    _pool.requests += 1
    entries = _pool.storages.setdefault(size, [])
    for entry in entries:
        if torch._C._storage_Use_Count(entry[0]._cdata) == 1:  # the pool's own
            entry[1] = _pool.requests
            return torch.empty(0, dtype=like.dtype, device="cpu").set_(entry[0], 0, shape, ())
    _pool.drop_idle()
    with torch.inference_mode(False):
        storage = torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()
    _pool.storages[size].append([storage, _pool.requests])
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage, 0, shape, ())


def is_large(matrix: Tensor) -> bool:
    """Whether a matrix that is written now is not going to be in a cache when it is read."""
    return matrix.nbytes > _LARGE


def free_buffers() -> None:
    """Give the memory back that :func:`buffer` keeps and nobody uses."""
    _pool.storages.clear()


def take(matrix: Tensor, rows: Units, columns: Units, out: Tensor | None = None) -> Tensor:
    """``matrix[rows][:, columns]``, contiguous.

    Args:
        matrix: ``[n, m]``.
        rows: Rows to take.
        columns: Columns to take.
        out: Contiguous ``[rows.count, columns.count]`` to write to; may be a new one.

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
    parts = [(dim, units) for dim, units in enumerate((rows, columns)) if not units.is_all(matrix.shape[dim])]
    for dim, units in parts:
        last = dim == parts[-1][0]
        matrix = torch.index_select(matrix, dim, to_device(units.index, matrix.device), out=out if last else None)
    return out if parts else out.copy_(matrix)


def put(matrix: Tensor, rows: Units, columns: Units, values: Tensor, clear: bool) -> None:
    """``matrix[rows][:, columns] = values``, in place.

    Args:
        matrix: Contiguous ``[n, m]``.
        rows: Rows to write.
        columns: Columns to write.
        values: ``[rows.count, columns.count]``.
        clear: Whether the other columns of these rows become zero.
    """
    if rows.count == 0 or matrix.numel() == 0:
        return
    values = values.contiguous()
    native = library()
    if native is not None and matrix.is_cpu:
        native.put(*_places(matrix, values, columns.count, rows, columns), clear)
        return
    every_row, every_column = rows.is_all(matrix.shape[0]), columns.is_all(matrix.shape[1])
    rows_index = to_device(rows.index, matrix.device)
    if every_column:
        matrix.copy_(values) if every_row else matrix.index_copy_(0, rows_index, values)
        return
    if every_row:
        target = matrix.zero_() if clear else matrix
    else:
        target = matrix.new_zeros(rows.count, matrix.shape[1]) if clear else matrix.index_select(0, rows_index)
    if columns.count:
        # scatter_ along a row is twice as fast as index_copy_
        target.scatter_(1, to_device(columns.index, matrix.device).expand(values.shape), values)
    if not every_row:
        matrix.index_copy_(0, rows_index, target)


def zero(matrix: Tensor, rows: Units, columns: Units) -> None:
    """``matrix[rows][:, columns] = 0``, in place, for a contiguous matrix."""
    if rows.count == 0 or columns.count == 0:
        return
    native = library()
    if native is not None and matrix.is_cpu:
        item, places = matrix.element_size(), (Runs(*rows.runs), Runs(*columns.runs))
        size = rows.count * columns.count
        threads = torch.get_num_threads()
        native.zero(matrix.data_ptr(), matrix.stride(0) * item, *places, item, size, threads, is_large(matrix))
    elif columns.is_all(matrix.shape[1]):
        matrix.index_fill_(0, to_device(rows.index, matrix.device), 0)
    else:
        matrix[to_device(rows.index, matrix.device)[:, None], to_device(columns.index, matrix.device)] = 0


def _places(to: Tensor, source: Tensor, stride: int, rows: Units, columns: Units) -> tuple[Any, ...]:
    """Arguments that the compiled copies have in common."""
    item, width = to.element_size(), to.shape[1]
    return (
        to.data_ptr(), width * item, source.data_ptr(), stride * item, Runs(*rows.runs), Runs(*columns.runs),
        item, rows.count * width, torch.get_num_threads(),
    )  # fmt: skip
