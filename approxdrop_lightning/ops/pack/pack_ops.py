"""Packing and unpacking as operators of PyTorch, each the gradient of the other.

On CUDA, and in Triton's interpreter, a call is one launch of :mod:`.triton_pack`; elsewhere it is the definition
(:mod:`.reference`). Tables are tensors, so a captured or compiled graph takes another pattern by other numbers in
them, as long as the sizes are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.ops.custom_op import custom_op
from approxdrop_lightning.ops.pack import reference

_HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def has_kernel(*tensors: Tensor | None) -> bool:
    """Whether there is a kernel for these operands on their device."""
    from approxdrop_lightning.ops.backend import has_triton

    first = tensors[0]
    assert first is not None
    if first.dtype not in _HALF_AND_SINGLE or not has_triton():
        return False
    if first.is_cuda:
        return True
    from approxdrop_lightning.ops.triton.common import INTERPRETED

    return INTERPRETED and first.device.type == "cpu"


@custom_op("approxdrop::pack")
def pack(
    dense: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    row_slots: Tensor | None,
    column_slots: Tensor | None,
    run: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Kept rows and columns of a dense matrix by group; the gradient of ``dense`` is dense, each entry written once.

    Args:
        dense: ``[n_rows, n_columns]``.
        rows: ``[groups, M]``, int32 or int64, -1 for padding; None for all rows in each group.
        columns: ``[groups, K]``, as ``rows``; not both may be None.
        row_slots: Inverse of ``rows`` (:func:`.reference.slots`), None if that is. For the gradient.
        column_slots: Inverse of ``columns``.
        run: ``columns`` lists aligned runs of that many neighbouring columns: loads are as wide.
        dtype: Type of the result; None: that of ``dense``.

    Returns:
        ``[groups, M, K]``.
    """
    if not has_kernel(dense):
        return reference.pack(dense, rows, columns, dtype)
    from approxdrop_lightning.ops.pack import triton_pack

    packed = _packed(dense, rows, columns, row_slots, column_slots, run, dtype)
    triton_pack.pack_launch(_in_rows(dense), packed, rows, columns, run).run()
    return packed


@pack.register_fake
def _packed(
    dense: Tensor, rows: Tensor | None, columns: Tensor | None, row_slots: Tensor | None, column_slots: Tensor | None,
    run: int = 1, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    table = rows if rows is not None else columns
    if table is None:
        raise ValueError("pack: rows or columns must be given")
    m = dense.shape[0] if rows is None else rows.shape[1]
    k = dense.shape[1] if columns is None else columns.shape[1]
    return dense.new_empty((table.shape[0], m, k), dtype=dtype or dense.dtype)


@custom_op("approxdrop::unpack")
def unpack(
    packed: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    row_slots: Tensor | None,
    column_slots: Tensor | None,
    n_rows: int,
    n_columns: int,
    run: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Dense sum over the groups of what :func:`pack` packs; the gradient of ``packed`` is packed.

    Args:
        packed: ``[groups, M, K]``.
        rows: As for :func:`pack`. For the gradient.
        columns: As for :func:`pack`. For the gradient.
        row_slots: Inverse of ``rows``, ``[layers, n_rows]``; None if each group holds all rows.
        column_slots: Inverse of ``columns``, ``[layers, n_columns]``.
        n_rows: Rows of the result.
        n_columns: Columns of the result.
        run: As for :func:`pack`.
        dtype: Type of the result; None: that of ``packed``.

    Returns:
        ``[n_rows, n_columns]``, zero where no group holds an entry.
    """
    if packed.numel() == 0 or not has_kernel(packed):
        return reference.unpack(packed, row_slots, column_slots, n_rows, n_columns, dtype)
    from approxdrop_lightning.ops.pack import triton_pack

    dense = _dense(packed, rows, columns, row_slots, column_slots, n_rows, n_columns, run, dtype)
    triton_pack.unpack_launch(packed.contiguous(), dense, row_slots, column_slots, run).run()
    return dense


@unpack.register_fake
def _dense(
    packed: Tensor, rows: Tensor | None, columns: Tensor | None, row_slots: Tensor | None,
    column_slots: Tensor | None, n_rows: int, n_columns: int, run: int = 1, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    if row_slots is None and column_slots is None:
        raise ValueError("unpack: row_slots or column_slots must be given")
    return packed.new_empty((n_rows, n_columns), dtype=dtype or packed.dtype)


def _in_rows(dense: Tensor) -> Tensor:
    """The matrix itself if its rows can be read in order, else a copy."""
    return dense if dense.stride(1) == 1 else dense.contiguous()


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dense, *tables, ctx.run, _ = _defaults(inputs, 7)
    ctx.shape, ctx.dtype = dense.shape, dense.dtype
    ctx.save_for_backward(*tables)


def _pack_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    dense = None if grad is None else unpack(grad, *ctx.saved_tensors, *ctx.shape, ctx.run, ctx.dtype)
    return dense, None, None, None, None, None, None


def _setup_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, *tables, _, _, ctx.run, _ = _defaults(inputs, 9)
    ctx.dtype = packed.dtype
    ctx.save_for_backward(*tables)


def _unpack_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    packed = None if grad is None else pack(grad, *ctx.saved_tensors, ctx.run, ctx.dtype)
    return packed, None, None, None, None, None, None, None, None


def _defaults(inputs: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """All arguments of a call that may have left out the last two."""
    return (*inputs, *(1, None)[len(inputs) - count :]) if len(inputs) < count else inputs


pack.register_autograd(_pack_backward, setup_context=_setup_pack)
unpack.register_autograd(_unpack_backward, setup_context=_setup_unpack)
