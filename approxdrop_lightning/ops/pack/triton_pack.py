"""Packing and unpacking as Triton kernels, one launch each for all groups (:mod:`.reference` defines them).

Both are bound by memory. Where kept columns come in aligned runs of 16 bytes, loads and stores are as wide; a table
is then read once for each run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from approxdrop_lightning.ops.triton.common import DTYPES, Specimen, specimens_of
from approxdrop_lightning.ops.triton.launch import Launch, aligned_run, whole

#: Rows and columns of the part that a program copies.
_CONFIGS = [
    triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)
    for rows, columns, warps in ((16, 128, 4), (8, 256, 4), (32, 128, 8), (4, 256, 4))
]


@triton.jit
def _entries(table, index, live, RUN: tl.constexpr):
    """Entries of a table whose aligned runs of ``RUN`` count up by one; below 0 where the first one is, or not live.

    Returns the entries and which of them are there. The load and the test are of the run's first entry, which is how
    the compiler knows that all of a run are alike.
    """
    first = tl.load(table + index // RUN * RUN, mask=live, other=-1).to(tl.int32)
    found = tl.max_contiguous(tl.multiple_of(first, RUN) + index % RUN, RUN)
    return found, first, live & (first >= 0)


@triton.autotune(_CONFIGS, key=["n_rows", "n_columns", "RUN"])
@triton.jit(do_not_specialize=("M", "n_rows", "n_columns"))
def pack_kernel(
    dense, packed, rows, columns, M, K, n_rows, n_columns, dense_stride,
    RUN: tl.constexpr, DENSE_ALIGN: tl.constexpr, PACKED_ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``packed[g, m, k] = dense[rows[g, m], columns[g, k]]``."""
    # Columns vary fastest: programs that run together read the same rows.
    group, blocks = tl.program_id(1), tl.cdiv(K, COLUMNS)
    m = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    m_live, k_live = m < M, k < whole(K, PACKED_ALIGN)
    row, row_kept = m, m_live
    column, column_kept = k, k_live
    if rows is not None:
        row, _, row_kept = _entries(rows + group * M, m, m_live, 1)
    if columns is not None:
        column, _, column_kept = _entries(columns + group * K, k, k_live, RUN)
    at = dense + row.to(tl.int64)[:, None] * whole(dense_stride, DENSE_ALIGN) + column[None, :]
    tile = tl.load(at, mask=row_kept[:, None] & column_kept[None, :], other=0.0)
    at = packed + (group.to(tl.int64) * M + m)[:, None] * whole(K, PACKED_ALIGN) + k[None, :]
    tl.store(at, tile.to(packed.dtype.element_ty), mask=m_live[:, None] & k_live[None, :])


@triton.autotune(_CONFIGS, key=["n_rows", "n_columns", "RUN"])
@triton.jit(do_not_specialize=("layers", "M", "n_rows"))
def unpack_kernel(
    packed, dense, row_slots, column_slots, layers, M, K, n_rows, n_columns,
    RUN: tl.constexpr, DENSE_ALIGN: tl.constexpr, PACKED_ALIGN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over the layers of what is packed of each entry."""
    blocks = tl.cdiv(n_columns, COLUMNS)
    r = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    r_live, c_live = r < n_rows, c < whole(n_columns, DENSE_ALIGN)
    width = whole(K, PACKED_ALIGN)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for layer in range(layers):
        if row_slots is not None:
            row, _, row_kept = _entries(row_slots + layer * n_rows, r, r_live, 1)
        if column_slots is not None:
            column, first, column_kept = _entries(column_slots + layer * n_columns, c, c_live, RUN)
            group = first // K
            column = tl.max_contiguous(tl.multiple_of(column - group * width, RUN), RUN)
            if row_slots is None:
                start = (group.to(tl.int64) * M)[None, :] + r[:, None]
                kept = r_live[:, None] & column_kept[None, :]
            else:
                start = row.to(tl.int64)[:, None]
                kept = row_kept[:, None] & column_kept[None, :] & ((row // M)[:, None] == group[None, :])
        else:
            column = c
            start = row.to(tl.int64)[:, None]
            kept = row_kept[:, None] & c_live[None, :]
        total += tl.load(packed + start * width + column[None, :], mask=kept, other=0.0).to(tl.float32)
    at = dense + r.to(tl.int64)[:, None] * whole(n_columns, DENSE_ALIGN) + c[None, :]
    tl.store(at, total.to(dense.dtype.element_ty), mask=r_live[:, None] & c_live[None, :])


def pack_launch(dense: Tensor, packed: Tensor, rows: Tensor | None, columns: Tensor | None, run: int = 1) -> Launch:
    """Write ``packed [groups, M, K]`` from ``dense``, whose rows may lie apart; tables as in :mod:`.pack_ops`."""
    groups, m, k = packed.shape
    return Launch(
        pack_kernel,
        lambda meta: (triton.cdiv(m, meta["ROWS"]) * triton.cdiv(k, meta["COLUMNS"]), groups),
        {
            "dense": dense, "packed": packed, "rows": _table(rows), "columns": _table(columns), "M": m, "K": k,
            "n_rows": dense.shape[0], "n_columns": dense.shape[1], "dense_stride": dense.stride(0),
        },
        _constants(dense, packed, columns is not None, run),
    )  # fmt: skip


def unpack_launch(
    packed: Tensor, dense: Tensor, row_slots: Tensor | None, column_slots: Tensor | None, run: int = 1
) -> Launch:
    """Write ``dense``, contiguous, from ``packed``. Tables as in :func:`.pack_ops.unpack`."""
    (n_rows, n_columns), (_, m, k) = dense.shape, packed.shape
    table = row_slots if row_slots is not None else column_slots
    assert table is not None
    return Launch(
        unpack_kernel,
        lambda meta: (triton.cdiv(n_rows, meta["ROWS"]) * triton.cdiv(n_columns, meta["COLUMNS"]),),
        {
            "packed": packed, "dense": dense, "row_slots": _table(row_slots), "column_slots": _table(column_slots),
            "layers": len(table), "M": m, "K": k, "n_rows": n_rows, "n_columns": n_columns,
        },
        _constants(dense, packed, column_slots is not None, run),
    )  # fmt: skip


def _table(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _constants(dense: Tensor, packed: Tensor, has_columns: bool, run: int) -> dict[str, Any]:
    narrower = min(dense.element_size(), packed.element_size())
    width = packed.shape[2]
    # A run is told to the compiler as far as a load can gain from it, and only if packed rows keep its alignment.
    return {
        "RUN": math.gcd(run, width, 16 // narrower) if has_columns else 1,
        "DENSE_ALIGN": aligned_run(dense.element_size(), dense.stride(0)),
        "PACKED_ALIGN": aligned_run(packed.element_size(), width),
    }


def specimens() -> list[Specimen]:
    """What is compiled ahead of time: blocks of 16 units in all ways, single ones and an odd width in the first."""
    found = []
    for dtype in DTYPES:
        for name, n, kept, run in (("blocks", 2048, 1024, 16), ("single", 2048, 1024, 1), ("ragged", 650, 325, 1)):
            dense = torch.empty(n, n, dtype=dtype, device="meta")
            both, columns_only = dense.new_empty(2, kept, kept), dense.new_empty(2, n, kept)
            table = torch.empty(2, kept, dtype=torch.int32, device="meta")
            slots = torch.empty(1, n, dtype=torch.int32, device="meta")
            for sides, packed, rows, row_slots in (
                ("both", both, table, slots),
                ("columns", columns_only, None, None),
            ):
                for kind, launch in (
                    ("pack", pack_launch(dense, packed, rows, table, run)),
                    ("unpack", unpack_launch(packed, dense, row_slots, slots, run)),
                ):
                    every = specimens_of(f"{kind}_{name}_{sides}", launch)
                    found += every if name == "blocks" else every[:1]
    return found
