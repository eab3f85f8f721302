"""Grouped products: interleaved and shuffled row patterns, all groups of rows in one launch.

A program axis runs over the groups (over blocks of the weight, for its gradient). What a group reads and writes
stands in the tables of :mod:`.tables`: rows by number, units by the starts of runs that lie together, so that 16
bytes that are kept together are one load. No atomics: each entry of a result is the work of one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from approxdrop_lightning.ops.row_linear.tables import GROUP_FIELDS, PAIR_FIELDS, SEGMENT_FIELDS
from approxdrop_lightning.ops.triton.launch import finish, whole

_GROUP = tl.constexpr(GROUP_FIELDS)
_PAIR = tl.constexpr(PAIR_FIELDS)
_SEGMENT = tl.constexpr(SEGMENT_FIELDS)
_IN = tl.constexpr(3)  # where a group's fields of inputs and outputs begin
_OUT = tl.constexpr(6)

_jit = triton.jit(
    do_not_specialize=("x_width", "y_width", "w_stride", "packed_rows", "packed_stride"),
    do_not_specialize_on_alignment=("rows", "groups", "blocks", "in_units", "out_units"),
)


@triton.jit
def _field(record, field):
    return tl.load(record + field).to(tl.int32)


@triton.jit
def _units(table, position, live, RUN: tl.constexpr):
    """Units at positions of a side's list, whose aligned runs of ``RUN`` lie together; 0: all in their order."""
    if RUN == 0:
        unit = position
    else:
        start = tl.load(table + position // RUN, mask=live, other=0).to(tl.int32)
        unit = tl.max_contiguous(tl.multiple_of(start + position % RUN, RUN), RUN)
    return unit


@triton.jit
def _row_starts(rows, group, r, live, width, SIDE: tl.constexpr, ALIGN: tl.constexpr, BY_GROUP: tl.constexpr):
    """Where rows of a group begin in the values of a side, int64."""
    if BY_GROUP:
        values = whole(tl.load(group + SIDE + 2), ALIGN)
        start = values + r.to(tl.int64) * whole(_field(group, SIDE + 1), ALIGN)
    else:
        start = tl.load(rows + _field(group, 0) + r, mask=live, other=0) * whole(width, ALIGN)
    return start


@_jit
def product(
    x, w, bias, y, z, rows, groups, in_units, out_units, x_width, y_width, w_stride, scale,
    FORWARD: tl.constexpr, PACKED: tl.constexpr, IN_BY_GROUP: tl.constexpr, OUT_BY_GROUP: tl.constexpr,
    IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr, IN_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    W_ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y[g] = act(scale * (x[g] @ W_g^T + b_g))``; not ``FORWARD``: ``y[g] = scale * x[g] @ W_g``.

    ``W_g`` is the block of the weight that group ``g`` keeps. The units that ``x`` holds are ``in`` here, in either
    direction.
    """
    IN: tl.constexpr = _IN if FORWARD else _OUT
    OUT: tl.constexpr = _OUT if FORWARD else _IN
    group = groups + tl.program_id(1) * _GROUP
    M, w_row = _field(group, 1), _field(group, 2)
    k_first, K = whole(_field(group, IN), IN_ALIGN), whole(_field(group, IN + 1), IN_ALIGN)
    n_first, N = whole(_field(group, OUT), OUT_ALIGN), whole(_field(group, OUT + 1), OUT_ALIGN)
    # Rows vary fastest: programs that run together read one tile of the weight, the larger operand, from the cache.
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    if pid >= tiles_m * tl.cdiv(N, BLOCK_N):
        return
    m = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_live, n_live = m < M, n < N
    x_rows = x + _row_starts(rows, group, m, m_live, x_width, IN, IN_ALIGN, IN_BY_GROUP)
    n_unit = _units(out_units, n_first + n, n_live, OUT_RUN)
    w_stride = whole(w_stride.to(tl.int64), W_ALIGN)
    # Of [k, n] each, the factor that is a row of the weight goes with its stride.
    if FORWARD:
        w_columns = w + (w_row + n if PACKED else n_unit)[None, :] * w_stride
    else:
        w_columns = w + (n if PACKED else n_unit)[None, :]

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_live = k < K
        if PACKED:
            w_k = k if FORWARD else w_row + k
        else:
            w_k = _units(in_units, k_first + k, k_live, IN_RUN)
        if FORWARD:
            w_at = w_columns + w_k[:, None]
        else:
            w_at = w_columns + w_k[:, None] * w_stride
        x_tile = tl.load(x_rows[:, None] + k[None, :], mask=m_live[:, None] & k_live[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=k_live[:, None] & n_live[None, :], other=0.0)
        accumulator = tl.dot(x_tile, w_tile, accumulator, input_precision=PRECISION)

    if bias is not None:
        accumulator += tl.load(bias + n_unit, mask=n_live, other=0.0).to(tl.float32)[None, :]
    at = _row_starts(rows, group, m, m_live, y_width, OUT, OUT_ALIGN, OUT_BY_GROUP)[:, None] + n[None, :]
    finish(accumulator * scale, y, z, at, m_live[:, None] & n_live[None, :], ACTIVATION)


@_jit
def weight_grad(
    dy, x, dw, rows, groups, blocks, in_units, out_units, x_width, y_width, w_stride, scale,
    IN_BY_GROUP: tl.constexpr, OUT_BY_GROUP: tl.constexpr, IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr,
    IN_ALIGN: tl.constexpr, OUT_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``dW[block] = scale * sum of dy[g]^T @ x[g]`` over the groups that keep it, for one tile of a block."""
    block = blocks + tl.program_id(1) * _PAIR
    n_first, N = whole(_field(block, 0), OUT_ALIGN), whole(_field(block, 1), OUT_ALIGN)
    k_first, K = whole(_field(block, 2), IN_ALIGN), whole(_field(block, 3), IN_ALIGN)
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
        dy_columns = dy + whole(n_first - _field(group, _OUT), OUT_ALIGN) + n
        x_columns = x + whole(k_first - _field(group, _IN), IN_ALIGN) + k
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            m_live = m < M
            dy_rows = _row_starts(rows, group, m, m_live, y_width, _OUT, OUT_ALIGN, OUT_BY_GROUP)
            x_rows = _row_starts(rows, group, m, m_live, x_width, _IN, IN_ALIGN, IN_BY_GROUP)
            dy_at, x_at = dy_columns[:, None] + dy_rows[None, :], x_columns[None, :] + x_rows[:, None]
            dy_tile = tl.load(dy_at, mask=n_live[:, None] & m_live[None, :], other=0.0)
            x_tile = tl.load(x_at, mask=m_live[:, None] & k_live[None, :], other=0.0)
            accumulator = tl.dot(dy_tile, x_tile, accumulator, input_precision=PRECISION)

    n_unit = _units(out_units, n_first + n, n_live, OUT_RUN)
    k_unit = _units(in_units, k_first + k, k_live, IN_RUN)
    at = dw + n_unit[:, None] * whole(w_stride.to(tl.int64), W_ALIGN) + k_unit[None, :]
    tl.store(at, (accumulator * scale).to(dw.dtype.element_ty), mask=n_live[:, None] & k_live[None, :])


@_jit
def bias_grad(
    dy, db, rows, groups, blocks, out_units, y_width, scale,
    OUT_BY_GROUP: tl.constexpr, OUT_RUN: tl.constexpr, OUT_ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``db[segment] = scale * sum of dy[g]`` over the rows of the groups that keep it."""
    segment = blocks + tl.program_id(1) * _SEGMENT
    n_first, N = whole(_field(segment, 0), OUT_ALIGN), whole(_field(segment, 1), OUT_ALIGN)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_live = n < N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(_field(segment, 2), _field(segment, 3)):
        group = groups + g * _GROUP
        M = _field(group, 1)
        dy_columns = dy + whole(n_first - _field(group, _OUT), OUT_ALIGN) + n
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            m_live = m < M
            dy_rows = _row_starts(rows, group, m, m_live, y_width, _OUT, OUT_ALIGN, OUT_BY_GROUP)
            at = dy_columns[None, :] + dy_rows[:, None]
            total += tl.load(at, mask=m_live[:, None] & n_live[None, :], other=0.0).to(tl.float32)
    unit = _units(out_units, n_first + n, n_live, OUT_RUN)
    tl.store(db + unit, (tl.sum(total, 0) * scale).to(db.dtype.element_ty), mask=n_live)


@_jit
def pack(
    w, packed, groups, in_units, out_units, w_stride, packed_rows, packed_stride,
    IN_RUN: tl.constexpr, OUT_RUN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The groups' blocks of the weight, one below the other, each filled up with zeros."""
    group = groups + tl.program_id(2) * _GROUP
    packed_stride = whole(packed_stride, 16)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    n_live, k_live = n < _field(group, _OUT + 1), k < _field(group, _IN + 1)
    n_unit = _units(out_units, _field(group, _OUT) + n, n_live, OUT_RUN)
    k_unit = _units(in_units, _field(group, _IN) + k, k_live, IN_RUN)
    w_at = w + n_unit[:, None] * w_stride.to(tl.int64) + k_unit[None, :]
    tile = tl.load(w_at, mask=n_live[:, None] & k_live[None, :], other=0.0)
    at = packed + (_field(group, 2) + n).to(tl.int64)[:, None] * packed_stride + k[None, :]
    tl.store(at, tile, mask=(n < packed_rows)[:, None] & (k < packed_stride)[None, :])


@_jit
def copy(
    dense, values, rows, groups, in_units, x_width,
    GATHER: tl.constexpr, IN_RUN: tl.constexpr, IN_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Kept values out of dense rows, or (not ``GATHER``) back to their places."""
    group = groups + tl.program_id(2) * _GROUP
    M, K = _field(group, 1), whole(_field(group, _IN + 1), IN_ALIGN)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_live, k_live = m < M, k < K
    unit = _units(in_units, whole(_field(group, _IN), IN_ALIGN) + k, k_live, IN_RUN)
    row = tl.load(rows + _field(group, 0) + m, mask=m_live, other=0)
    at_dense = dense + row[:, None] * whole(x_width, IN_RUN) + unit[None, :]
    at_values = values + _row_starts(rows, group, m, m_live, 0, _IN, IN_ALIGN, True)[:, None] + k[None, :]
    live = m_live[:, None] & k_live[None, :]
    if GATHER:
        tl.store(at_values, tl.load(at_dense, mask=live), mask=live)
    else:
        tl.store(at_dense, tl.load(at_values, mask=live), mask=live)
