"""Grouped products: interleaved and shuffled row patterns, all groups of rows in one launch.

A program axis runs over the groups (over blocks of the weight, for its gradient). What a group reads and writes
stands in the tables of :mod:`.tables`: rows by number, units by the starts of runs that lie together, so that 16
bytes that are kept together are one load. No atomics: each entry of a result is the work of one program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from approxdrop_lightning.ops.tables import GROUP_FIELDS, PAIR_FIELDS, SEGMENT_FIELDS, Sizes, Tables, make_plan
from approxdrop_lightning.ops.triton_common import ARCHS, DTYPES, Specimen, Tiling, specimen, tilings
from approxdrop_lightning.ops.triton_launch import Launch, aligned_run, finish, precision, whole
from approxdrop_lightning.pattern import RowPattern

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


def aligned(sizes: Sizes) -> bool:
    """Whether all rows of a product's operands begin at multiples of 16 bytes."""
    return min(sizes.in_align, sizes.out_align) > 1


def packs(sizes: Sizes) -> bool:
    """Whether kept columns of the weight are copied first: where 16 bytes of a row are not kept together."""
    return sizes.in_run == 1


def packed_shape(sizes: Sizes) -> tuple[int, int]:
    """Shape of a packed weight, whose rows are padded so that loads are aligned."""
    return sizes.groups * sizes.most_out, -(-sizes.most_in // 16) * 16


def pack_launch(w: Tensor, packed: Tensor, tables: Tables, sizes: Sizes) -> Launch:
    """Copy each group's block of the weight ``w`` to ``packed``, of :func:`packed_shape`."""
    tiles = {"BLOCK_N": 32, "BLOCK_K": 64}
    return Launch(
        pack,
        (triton.cdiv(sizes.most_out, 32), triton.cdiv(packed.shape[1], 64), sizes.groups),
        {
            "w": w, "packed": packed, "groups": tables.groups, "in_units": tables.in_units,
            "out_units": tables.out_units, "w_stride": w.stride(0), "packed_rows": sizes.most_out,
            "packed_stride": packed.stride(0),
        },
        {"IN_RUN": sizes.in_run, "OUT_RUN": sizes.out_run} | tiles,
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
    tiling: Tiling,
    activation: str = "identity",
    forward: bool = True,
) -> Launch:
    """``y[g] = act(scale * (x[g] @ W_g^T + b_g))``, or not ``forward``: ``y[g] = scale * x[g] @ W_g``.

    Args:
        x: Values that are multiplied.
        w: The weight, packed if :func:`packs` says so.
        bias: Dense, or None.
        y: Values that are written.
        z: Like ``y``, written for GELU: its argument; else None.
        tables: Of the plan.
        sizes: Of the plan.
        scale: Factor.
        tiling: How it is cut.
        activation: One of :data:`.reference.ACTIVATIONS`.
        forward: Whether inputs are summed over; else outputs are.
    """
    packed = packs(sizes)
    if not forward:
        tables, sizes = _turned(tables, sizes)
    blocks = tiling.blocks(tables.rows.numel(), sizes.n_out, sizes.n_in)
    tiles = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
    programs = triton.cdiv(sizes.most_rows, tiles["BLOCK_M"]) * triton.cdiv(sizes.most_out, tiles["BLOCK_N"])
    return Launch(
        product,
        (programs, sizes.groups),
        {
            "x": x, "w": w, "bias": bias, "y": y, "z": z, "rows": tables.rows, "groups": tables.groups,
            "in_units": tables.in_units, "out_units": tables.out_units,
            "x_width": _width(x), "y_width": _width(y), "w_stride": w.stride(0), "scale": scale,
        },
        _sides(sizes) | {
            "FORWARD": forward, "PACKED": packed,
            "W_ALIGN": aligned_run(w.element_size(), w.stride(0)),
            "ACTIVATION": activation, "PRECISION": precision(x.dtype),
        } | tiles,
        tiling.num_warps, tiling.num_stages,
    )  # fmt: skip


def weight_grad_launch(
    dy: Tensor, x: Tensor, dw: Tensor, tables: Tables, sizes: Sizes, scale: float, tiling: Tiling
) -> Launch:
    """Kept entries of the weight's gradient; the others of ``dw`` are not touched."""
    blocks = tiling.blocks(sizes.n_out, sizes.n_in, tables.rows.numel())
    tiles = dict(zip(("BLOCK_N", "BLOCK_K", "BLOCK_M"), blocks, strict=True))
    programs = triton.cdiv(sizes.most_out, tiles["BLOCK_N"]) * triton.cdiv(sizes.most_in, tiles["BLOCK_K"])
    return Launch(
        weight_grad,
        (programs, tables.pairs.numel() // PAIR_FIELDS),
        {
            "dy": dy, "x": x, "dw": dw, "rows": tables.rows, "groups": tables.groups, "blocks": tables.pairs,
            "in_units": tables.in_units, "out_units": tables.out_units,
            "x_width": _width(x), "y_width": _width(dy), "w_stride": dw.stride(0), "scale": scale,
        },
        _sides(sizes) | {
            "W_ALIGN": aligned_run(dw.element_size(), dw.stride(0)), "PRECISION": precision(x.dtype),
        } | tiles,
        tiling.num_warps, tiling.num_stages,
    )  # fmt: skip


def bias_grad_launch(dy: Tensor, db: Tensor, tables: Tables, sizes: Sizes, scale: float) -> Launch:
    """Kept entries of the bias's gradient; the others of ``db`` are not touched."""
    tiles = {"BLOCK_N": 64, "BLOCK_M": 32}
    return Launch(
        bias_grad,
        (triton.cdiv(sizes.most_out, 64), tables.segments.numel() // SEGMENT_FIELDS),
        {
            "dy": dy, "db": db, "rows": tables.rows, "groups": tables.groups, "blocks": tables.segments,
            "out_units": tables.out_units, "y_width": _width(dy), "scale": scale,
        },
        {name: value for name, value in _sides(sizes).items() if name.startswith("OUT")} | tiles,
    )  # fmt: skip


def copy_launch(dense: Tensor, values: Tensor, tables: Tables, sizes: Sizes, gather: bool) -> Launch:
    """Kept values out of ``dense`` rows; or, not ``gather``, back to their places in it, the others not touched."""
    tiles = {"BLOCK_M": 16, "BLOCK_K": 64}
    return Launch(
        copy,
        (triton.cdiv(sizes.most_rows, 16), triton.cdiv(sizes.most_in, 64), sizes.groups),
        {
            "dense": dense, "values": values, "rows": tables.rows, "groups": tables.groups,
            "in_units": tables.in_units, "x_width": dense.shape[1],
        },
        {"GATHER": gather, "IN_RUN": sizes.in_run, "IN_ALIGN": sizes.in_align} | tiles,
    )  # fmt: skip


def _sides(sizes: Sizes) -> dict[str, int | bool]:
    return {
        "IN_BY_GROUP": bool(sizes.in_by_group), "OUT_BY_GROUP": bool(sizes.out_by_group),
        "IN_RUN": sizes.in_run, "OUT_RUN": sizes.out_run,
        "IN_ALIGN": sizes.in_align, "OUT_ALIGN": sizes.out_align,
    }  # fmt: skip


def _turned(tables: Tables, sizes: Sizes) -> tuple[Tables, Sizes]:
    """With inputs and outputs exchanged, for the product that goes backward."""
    return (
        tables._replace(in_units=tables.out_units, out_units=tables.in_units),
        sizes._replace(
            in_by_group=sizes.out_by_group, out_by_group=sizes.in_by_group,
            in_run=sizes.out_run, out_run=sizes.in_run,
            in_align=sizes.out_align, out_align=sizes.in_align,
            most_in=sizes.most_out, most_out=sizes.most_in, n_in=sizes.n_out, n_out=sizes.n_in,
        ),
    )  # fmt: skip


def _width(values: Tensor) -> int:
    """Width of rows; values that are packed by group have none."""
    return values.shape[1] if values.dim() == 2 else 0


def specimens() -> list[Specimen]:
    """What is compiled ahead of time: the default pattern in all ways to cut it; others in the first way."""
    shuffled = RowPattern(2048, 2, 0, interleave=True, order=torch.arange(128), block_size=16)
    others = {
        "regular": RowPattern(2048, 2, 0, interleave=True),
        "overlapping": RowPattern(2048, 3, 0, 2, interleave=True, order=torch.arange(128), block_size=16),
        "ragged": RowPattern(650, 2, 0, interleave=True, order=torch.arange(50), block_size=13),
    }
    found = []
    for arch in ARCHS:
        for dtype in DTYPES:
            cases = [("shuffled", shuffled, tiling) for tiling in tilings(arch, dtype)]
            for name, pattern in others.items():
                cases.append((name, pattern, tilings(arch, dtype, aligned=name != "ragged")[0]))
            for name, pattern, tiling in cases:
                found += [
                    specimen(f"group_{kind}_{name}_{'x'.join(map(str, tiling[:3]))}", launch, (arch,))
                    for kind, launch in _example_launches(pattern, dtype, tiling).items()
                ]
    return found


def _example_launches(pattern: RowPattern, dtype: torch.dtype, tiling: Tiling) -> dict[str, Launch]:
    w = torch.empty(pattern.n, pattern.n, dtype=dtype, device="meta")
    tables, sizes, in_shape, out_shape, _ = make_plan(pattern, pattern, (256,), w)
    x, y, dense = (w.new_empty(shape) for shape in (in_shape, out_shape, (256, pattern.n)))
    launches = {}
    if packs(sizes):
        w_packed = w.new_empty(packed_shape(sizes))
        launches["pack"] = pack_launch(w, w_packed, tables, sizes)
    else:
        w_packed = w
    return launches | {
        "forward": product_launch(x, w_packed, w[0], y, y, tables, sizes, 2.0, tiling, "gelu"),
        "input_grad": product_launch(y, w_packed, None, x, None, tables, sizes, 2.0, tiling, forward=False),
        "weight_grad": weight_grad_launch(y, x, w, tables, sizes, 2.0, tiling),
        "bias_grad": bias_grad_launch(y, w[0], tables, sizes, 2.0),
        "gather": copy_launch(dense, x, tables, sizes, gather=True),
        "scatter": copy_launch(dense, x, tables, sizes, gather=False),
    }
