"""Definition of packing and unpacking in plain PyTorch: what the kernels compute, and what a compiler can fuse.

A dense matrix ``[n_rows, n_columns]`` is packed to ``[groups, M, K]``. Group ``g`` holds the rows ``rows[g]`` and of
them the columns ``columns[g]``; without a table it holds all of them, in their order. An index of -1 is padding, for
groups of unequal size: packed as zero, and skipped when unpacking.

Unpacking adds up what the groups hold of each entry. It reads inverse tables, so that each entry of the result is
written once: groups fall into *layers* of equally many consecutive groups, and within a layer no two groups may hold
the same row, or the same column. ``slots(rows, n_rows, layers)`` says for each layer and row where it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slots(kept: Tensor, n: int, layers: int) -> Tensor:
    """Inverse of a table of kept rows or columns.

    Args:
        kept: ``[groups, M]``: indices below ``n``, or -1 for padding.
        n: Number of rows or columns of the dense matrix.
        layers: Number of layers; it divides the number of groups. As many as groups are always right; fewer are
            faster, but no two groups of a layer may hold the same index.

    Returns:
        ``[layers, n]``, int32: ``g * M + position`` where group ``g`` of the layer holds the index, -1 if none does.
    """
    groups, width = kept.shape
    position = torch.arange(groups * width, dtype=torch.int32, device=kept.device).view(
        layers, -1 if groups * width else 0
    )
    # Padding goes to an entry of its own, which is cut off.
    target = kept.reshape(position.shape).to(torch.int64)
    target = torch.where(target < 0, n, target)
    table = torch.full((layers, n + 1), -1, dtype=torch.int32, device=kept.device)
    return table.scatter(1, target, position)[:, :n].contiguous()


def pack(dense: Tensor, rows: Tensor | None, columns: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Kept entries by group.

    Args:
        dense: ``[n_rows, n_columns]``.
        rows: ``[groups, M]``, or None for all rows in each group.
        columns: ``[groups, K]``, or None for all columns.
        dtype: Type of the result; None: that of ``dense``.

    Returns:
        ``[groups, M, K]``, zero where an index is -1.
    """
    if rows is None and columns is None:
        raise ValueError("pack: rows or columns must be given")
    if rows is None:
        assert columns is not None
        packed = dense[:, columns.clamp(min=0)].transpose(0, 1)
        kept = (columns >= 0)[:, None, :]
    elif columns is None:
        packed = dense[rows.clamp(min=0)]
        kept = (rows >= 0)[:, :, None]
    else:
        packed = dense[rows.clamp(min=0)[:, :, None], columns.clamp(min=0)[:, None, :]]
        kept = (rows >= 0)[:, :, None] & (columns >= 0)[:, None, :]
    return torch.where(kept, packed, 0).to(dtype or dense.dtype).contiguous()


def unpack(
    packed: Tensor,
    row_slots: Tensor | None,
    column_slots: Tensor | None,
    n_rows: int,
    n_columns: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum of what the groups hold of each entry, zero where none holds it; sums are in float32 at least.

    Args:
        packed: ``[groups, M, K]``.
        row_slots: ``[layers, n_rows]``, see :func:`slots`; None if each group holds all rows.
        column_slots: ``[layers, n_columns]``; None if each group holds all columns.
        n_rows: Rows of the result.
        n_columns: Columns of the result.
        dtype: Type of the result; None: that of ``packed``.

    Returns:
        ``[n_rows, n_columns]``.
    """
    if row_slots is None and column_slots is None:
        raise ValueError("unpack: row_slots or column_slots must be given")
    groups, m, k = packed.shape
    dtype = dtype or packed.dtype
    if packed.numel() == 0:
        return packed.new_zeros((n_rows, n_columns), dtype=dtype)
    total = None
    if row_slots is not None:
        layers = len(row_slots)
    else:
        assert column_slots is not None
        layers = len(column_slots)
    for layer in range(layers):
        row = column = None
        if row_slots is not None:
            row = row_slots[layer].to(torch.int64)
        if column_slots is not None:
            column = column_slots[layer].to(torch.int64)
        if row is None:
            assert column is not None
            part = packed[column.clamp(min=0) // k, :, column % k].t()
            kept = (column >= 0)[None, :]
        elif column is None:
            part = packed.reshape(groups * m, k)[row.clamp(min=0)]
            kept = (row >= 0)[:, None]
        else:
            part = packed.reshape(groups * m, k)[row.clamp(min=0)[:, None], (column % k)[None, :]]
            kept = (row >= 0)[:, None] & (column >= 0)[None, :] & ((row // m)[:, None] == (column // k)[None, :])
        part = torch.where(kept, part, 0)
        if layers > 1 and part.dtype in (torch.float16, torch.bfloat16):
            part = part.float()
        total = part if total is None else total + part
    assert total is not None
    return total.to(dtype).contiguous()
