"""Grouped products: interleaved and shuffled row patterns, all groups of rows in one launch.

A program axis runs over the groups (over blocks of the weight, for its gradient). What a group reads and writes
stands in the tables of :mod:`.tables`: rows by number, units by the starts of runs that lie together, so that a run of
16 bytes is still one load. No atomics: each entry of a result is the work of one program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from approxdrop_lightning.ops.tables import GROUP_FIELDS, PAIR_FIELDS, SEGMENT_FIELDS, Sizes, Tables
from approxdrop_lightning.ops.triton_launch import Launch, aligned_run, finish, precision

_GROUP = tl.constexpr(GROUP_FIELDS)
_PAIR = tl.constexpr(PAIR_FIELDS)
_SEGMENT = tl.constexpr(SEGMENT_FIELDS)
_IN = tl.constexpr(3)  # where a group's fields of inputs and outputs begin
_OUT = tl.constexpr(6)

_jit = triton.jit(
    do_not_specialize=("x_width", "y_width", "w_stride", "packed_stride"),
    do_not_specialize_on_alignment=("rows", "groups", "blocks", "in_units", "out_units"),
)


@triton.jit
def _field(record, field):
    return tl.load(record + field).to(tl.int32)


@triton.jit
def _units(table, position, live, RUN: tl.constexpr, INDEXED: tl.constexpr):
    """Units at positions of a side's list; aligned runs of ``RUN`` lie together."""
    if INDEXED:
        start = tl.load(table + position // RUN, mask=live, other=0).to(tl.int32)
        unit = tl.max_contiguous(tl.multiple_of(start + position % RUN, RUN), RUN)
    else:
        unit = position
    return unit


@triton.jit
def _row_starts(rows, group, r, live, width, SIDE: tl.constexpr, RUN: tl.constexpr, BY_GROUP: tl.constexpr):
    """Where rows of a group begin in the values of a side, int64."""
    if BY_GROUP:
        values = tl.multiple_of(tl.load(group + SIDE + 2), RUN)
        start = values + r.to(tl.int64) * tl.multiple_of(_field(group, SIDE + 1), RUN)
    else:
        row = tl.load(rows + _field(group, 0) + r, mask=live, other=0)
        start = row * tl.multiple_of(width, RUN)
    return start


@_jit
def product(
    x, w, bias, y, z, rows, groups, in_units, out_units, x_width, y_width, w_stride, scale,
    FORWARD: tl.constexpr, PACKED: tl.constexpr, X_BY_GROUP: tl.constexpr, Y_BY_GROUP: tl.constexpr,
    IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr, W_RUN: tl.constexpr,
    IN_INDEXED: tl.constexpr, OUT_INDEXED: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y[g] = act(scale * (x[g] @ W_g^T + b_g))``; not ``FORWARD``: ``y[g] = scale * x[g] @ W_g``.

    ``W_g`` is the block of the weight that group ``g`` keeps. ``in_units`` are those that are summed over.
    """
    group = groups + tl.program_id(1) * _GROUP
    M, w_row = _field(group, 1), _field(group, 2)
    IN: tl.constexpr = _IN if FORWARD else _OUT
    OUT: tl.constexpr = _OUT if FORWARD else _IN
    k_first, K = _field(group, IN), tl.multiple_of(_field(group, IN + 1), IN_RUN)
    n_first, N = _field(group, OUT), tl.multiple_of(_field(group, OUT + 1), OUT_RUN)
    # Rows vary fastest: programs that run together read one tile of the weight, the larger operand, from the cache.
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    if pid >= tiles_m * tl.cdiv(N, BLOCK_N):
        return
    m = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_live, n_live = m < M, n < N
    x_rows = x + _row_starts(rows, group, m, m_live, x_width, IN, IN_RUN, X_BY_GROUP)
    n_unit = _units(out_units, n_first + n, n_live, OUT_RUN, OUT_INDEXED)
    w_n = (w_row + n if FORWARD else n) if PACKED else n_unit
    w_stride = tl.multiple_of(w_stride.to(tl.int64), W_RUN)
    if FORWARD:
        w_columns = w + w_n[None, :] * w_stride
    else:
        w_columns = w + w_n[None, :]

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_live = k < K
        if PACKED:
            w_k = k if FORWARD else w_row + k
        else:
            w_k = _units(in_units, k_first + k, k_live, IN_RUN, IN_INDEXED)
        x_tile = tl.load(x_rows[:, None] + k[None, :], mask=m_live[:, None] & k_live[None, :], other=0.0)
        if FORWARD:
            w_tile_at = w_columns + w_k[:, None]
        else:
            w_tile_at = w_columns + w_k[:, None] * w_stride
        w_tile = tl.load(w_tile_at, mask=k_live[:, None] & n_live[None, :], other=0.0)
        accumulator = tl.dot(x_tile, w_tile, accumulator, input_precision=PRECISION)

    if BIAS:
        accumulator += tl.load(bias + n_unit, mask=n_live, other=0.0).to(tl.float32)[None, :]
    at = _row_starts(rows, group, m, m_live, y_width, OUT, OUT_RUN, Y_BY_GROUP)[:, None] + n[None, :]
    finish(accumulator * scale, y, z, at, m_live[:, None] & n_live[None, :], ACTIVATION)


@_jit
def weight_grad(
    dy, x, dw, rows, groups, blocks, in_units, out_units, x_width, y_width, w_stride, scale,
    X_BY_GROUP: tl.constexpr, Y_BY_GROUP: tl.constexpr, IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr,
    W_RUN: tl.constexpr, IN_INDEXED: tl.constexpr, OUT_INDEXED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``dW[block] = scale * sum over the groups that keep it of dy[g]^T @ x[g]``, for one tile of a block."""
    block = blocks + tl.program_id(1) * _PAIR
    out_first, N = _field(block, 0), tl.multiple_of(_field(block, 1), OUT_RUN)
    in_first, K = _field(block, 2), tl.multiple_of(_field(block, 3), IN_RUN)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    if pid >= tiles_n * tl.cdiv(K, BLOCK_K):
        return
    n = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (pid // tiles_n) * BLOCK_K + tl.arange(0, BLOCK_K)
    n_live, k_live = n < N, k < K

    accumulator = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for g in range(_field(block, 4), _field(block, 5)):
        group = groups + g * _GROUP
        M = _field(group, 1)
        n_here = tl.multiple_of(out_first - _field(group, _OUT), OUT_RUN) + n
        k_here = tl.multiple_of(in_first - _field(group, _IN), IN_RUN) + k
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            m_live = m < M
            dy_rows = dy + _row_starts(rows, group, m, m_live, y_width, _OUT, OUT_RUN, Y_BY_GROUP)
            x_rows = x + _row_starts(rows, group, m, m_live, x_width, _IN, IN_RUN, X_BY_GROUP)
            dy_tile = tl.load(
                dy_rows[None, :] + n_here[:, None], mask=n_live[:, None] & m_live[None, :], other=0.0
            )
            x_tile = tl.load(x_rows[:, None] + k_here[None, :], mask=m_live[:, None] & k_live[None, :], other=0.0)
            accumulator = tl.dot(dy_tile, x_tile, accumulator, input_precision=PRECISION)

    n_unit = _units(out_units, out_first + n, n_live, OUT_RUN, OUT_INDEXED)
    k_unit = _units(in_units, in_first + k, k_live, IN_RUN, IN_INDEXED)
    at = dw + n_unit[:, None] * tl.multiple_of(w_stride.to(tl.int64), W_RUN) + k_unit[None, :]
    tl.store(at, (accumulator * scale).to(dw.dtype.element_ty), mask=n_live[:, None] & k_live[None, :])


@_jit
def bias_grad(
    dy, db, rows, groups, blocks, out_units, y_width, scale,
    Y_BY_GROUP: tl.constexpr, OUT_RUN: tl.constexpr, OUT_INDEXED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``db[segment] = scale * sum of dy[g]`` over the rows of the groups that keep it."""
    segment = blocks + tl.program_id(1) * _SEGMENT
    first, N = _field(segment, 0), _field(segment, 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_live = n < N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(_field(segment, 2), _field(segment, 3)):
        group = groups + g * _GROUP
        M = _field(group, 1)
        n_here = first - _field(group, _OUT) + n
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            dy_rows = dy + _row_starts(rows, group, m, m < M, y_width, _OUT, OUT_RUN, Y_BY_GROUP)
            live = (m < M)[:, None] & n_live[None, :]
            total += tl.load(dy_rows[:, None] + n_here[None, :], mask=live, other=0.0).to(tl.float32)
    unit = _units(out_units, first + n, n_live, OUT_RUN, OUT_INDEXED)
    tl.store(db + unit, (tl.sum(total, 0) * scale).to(db.dtype.element_ty), mask=n_live)


@_jit
def pack(
    w, packed, groups, in_units, out_units, w_stride, packed_stride,
    IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr, IN_INDEXED: tl.constexpr, OUT_INDEXED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The groups' blocks of the weight, one below the other."""
    group = groups + tl.program_id(2) * _GROUP
    N, K = _field(group, _OUT + 1), _field(group, _IN + 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n_live, k_live = n < N, k < K
    n_unit = _units(out_units, _field(group, _OUT) + n, n_live, OUT_RUN, OUT_INDEXED)
    k_unit = _units(in_units, _field(group, _IN) + k, k_live, IN_RUN, IN_INDEXED)
    live = n_live[:, None] & k_live[None, :]
    tile = tl.load(w + n_unit[:, None] * w_stride.to(tl.int64) + k_unit[None, :], mask=live)
    row = (_field(group, 2) + n).to(tl.int64) * tl.multiple_of(packed_stride, 16)
    tl.store(packed + row[:, None] + k[None, :], tile, mask=live)


def packs(sizes: Sizes) -> bool:
    """Whether the kept columns of a weight are copied first: where a load would not get 16 bytes of a row."""
    return bool(sizes.in_indexed) and sizes.in_run == 1


def packed_shape(sizes: Sizes, tables: Tables) -> tuple[int, int]:
    """Shape of the packed weight, rows a multiple of 16 elements."""
    return sizes.groups * sizes.most_out, -(-sizes.most_in // 16) * 16


def pack_launch(w: Tensor, packed: Tensor, tables: Tables, sizes: Sizes) -> Launch:
    """Copy each group's block of a weight."""
    n, k = 32, 64
    return Launch(
        pack,
        (triton.cdiv(sizes.most_out, n), triton.cdiv(sizes.most_in, k), sizes.groups),
        {
            "w": w, "packed": packed, "groups": tables.groups, "in_units": tables.in_units,
            "out_units": tables.out_units, "w_stride": w.stride(0), "packed_stride": packed.stride(0),
        },
        _sides(sizes) | {"BLOCK_N": n, "BLOCK_K": k},
    )  # fmt: skip


def product_launch(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    tables: Tables,
    sizes: Sizes,
    scale: float,
    activation: str = "identity",
    forward: bool = True,
    packed: bool = False,
) -> Launch:
    """``y[g] = act(scale * (x[g] @ W_g^T + b_g))``, or not ``forward``: ``y[g] = scale * x[g] @ W_g``.

    Args:
        x: Values that are multiplied.
        w: The weight, dense or packed.
        bias: Dense, or None.
        y: Values that are written.
        z: Like ``y``, for GELU; else None.
        tables: Of the plan.
        sizes: Of the plan.
        scale: Factor.
        activation: ``"identity"``, ``"relu"`` or ``"gelu"``.
        forward: Whether inputs are summed over; else outputs are.
        packed: Whether ``w`` is packed.
    """
    sides = [
        (sizes.in_run, sizes.in_indexed, sizes.in_by_group, sizes.most_in, tables.in_units),
        (sizes.out_run, sizes.out_indexed, sizes.out_by_group, sizes.most_out, tables.out_units),
    ]
    (in_run, in_indexed, x_by_group, _, in_units), (out_run, out_indexed, y_by_group, most, out_units) = (
        sides if forward else sides[::-1]
    )
    tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    programs = triton.cdiv(sizes.most_rows, tiles["BLOCK_M"]) * triton.cdiv(most, tiles["BLOCK_N"])
    return Launch(
        product,
        (programs, sizes.groups),
        {
            "x": x, "w": w, "bias": bias, "y": y, "z": z, "rows": tables.rows, "groups": tables.groups,
            "in_units": in_units, "out_units": out_units,
            "x_width": x.shape[-1], "y_width": y.shape[-1], "w_stride": w.stride(0), "scale": scale,
        },
        {
            "FORWARD": forward, "PACKED": packed, "X_BY_GROUP": bool(x_by_group), "Y_BY_GROUP": bool(y_by_group),
            "IN_RUN": in_run, "OUT_RUN": out_run, "W_RUN": aligned_run(w.element_size(), w.stride(0)),
            "IN_INDEXED": bool(in_indexed), "OUT_INDEXED": bool(out_indexed),
            "BIAS": bias is not None, "ACTIVATION": activation, "PRECISION": precision(x.dtype),
        } | tiles,
    )  # fmt: skip


def weight_grad_launch(
    dy: Tensor, x: Tensor, dw: Tensor, tables: Tables, sizes: Sizes, scale: float
) -> Launch:
    """Kept entries of the weight's gradient; the others of ``dw`` are not touched."""
    tiles = {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_M": 32}
    programs = triton.cdiv(sizes.most_out, tiles["BLOCK_N"]) * triton.cdiv(sizes.most_in, tiles["BLOCK_K"])
    return Launch(
        weight_grad,
        (programs, tables.pairs.numel() // PAIR_FIELDS),
        {
            "dy": dy, "x": x, "dw": dw, "rows": tables.rows, "groups": tables.groups, "blocks": tables.pairs,
            "in_units": tables.in_units, "out_units": tables.out_units,
            "x_width": x.shape[-1], "y_width": dy.shape[-1], "w_stride": dw.stride(0), "scale": scale,
        },
        _sides(sizes) | {
            "X_BY_GROUP": bool(sizes.in_by_group), "Y_BY_GROUP": bool(sizes.out_by_group),
            "W_RUN": aligned_run(dw.element_size(), dw.stride(0)), "PRECISION": precision(x.dtype),
        } | tiles,
    )  # fmt: skip


def bias_grad_launch(dy: Tensor, db: Tensor, tables: Tables, sizes: Sizes, scale: float) -> Launch:
    """Kept entries of the bias's gradient; the others of ``db`` are not touched."""
    n = 64
    return Launch(
        bias_grad,
        (triton.cdiv(sizes.most_out, n), tables.segments.numel() // SEGMENT_FIELDS),
        {
            "dy": dy, "db": db, "rows": tables.rows, "groups": tables.groups, "blocks": tables.segments,
            "out_units": tables.out_units, "y_width": dy.shape[-1], "scale": scale,
        },
        {
            "Y_BY_GROUP": bool(sizes.out_by_group), "OUT_RUN": sizes.out_run,
            "OUT_INDEXED": bool(sizes.out_indexed), "BLOCK_N": n, "BLOCK_M": 32,
        },
    )  # fmt: skip


def _sides(sizes: Sizes) -> dict[str, int | bool]:
    return {
        "IN_RUN": sizes.in_run, "OUT_RUN": sizes.out_run,
        "IN_INDEXED": bool(sizes.in_indexed), "OUT_INDEXED": bool(sizes.out_indexed),
    }  # fmt: skip
