"""Triton kernels for products with only the kept tiles of a weight: forward and both gradients.

Rows of tiles that are congruent modulo ``dp`` keep the same columns of tiles. A pattern therefore amounts to ``dp``
dense products, one for each class of rows of tiles. A program computes a block of one class: its rows are every
``dp``-th tile, and it sums over the kept columns, whose positions have a closed form. There is no table, no tile mask
and no branch per tile, and a step of the sum may be longer or shorter than a tile. The transposed weight follows the
same diagonal rule, so the input gradient uses the same kernel with the strides of the weight swapped.

``offset`` is read from memory, so that the pattern of a captured CUDA graph can be changed before each replay.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from approxdrop_lightning.ops.triton.common import (
    ARCHS,
    DTYPES,
    Specimen,
    autotune_product,
    bucket,
    specimens_of,
)
from approxdrop_lightning.ops.triton.launch import Launch, aligned_run, precision

#: All kept shares of a layer use the same tile sizes, which are chosen by the dense sizes.
_KEY = ["M_BUCKET", "N", "K", "TILE", "PRECISION"]


@triton.jit
def _kept_tiles(offset, row, tiles, dp, keep):
    """Kept tiles of a row of tiles: the ``t``-th in ``[first, last)`` is ``start + t // keep * dp + t % keep``."""
    start = (tl.load(offset).to(tl.int32) - row + dp) % dp
    start = tl.where(start + keep > dp, start - dp, start)  # kept residues that wrap around start before tile 0
    span = tiles - start
    last = span // dp * keep + tl.minimum(span % dp, keep)
    return start, tl.maximum(-start, 0), last


@triton.jit
def _unit(place, first, period, length, TILE: tl.constexpr):
    """Unit at a position among tiles in runs of ``length`` every ``period``, starting with tile ``first``."""
    # RUN consecutive positions are adjacent units, which allows loads of that width.
    RUN: tl.constexpr = TILE & -TILE if TILE % 16 else 16
    tile = place // TILE
    unit = (first + tile // length * period + tile % length) * TILE + place % TILE
    return tl.max_contiguous(tl.multiple_of(unit, RUN), RUN)


@autotune_product("BLOCK_M", "BLOCK_N", "BLOCK_K", key=_KEY)
@triton.jit(do_not_specialize=("M", "M_BUCKET", "dp", "keep"))
def product(
    x, w, bias, y, offset, M, M_BUCKET, N, K, dp, keep, x_stride, w_stride_n, w_stride_k, y_stride, scale,
    TILE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y = scale * x @ (w * mask)^T + bias`` for ``x [M, K]`` and ``w [N, K]``: one block of one class."""
    # Rows vary fastest, so that concurrent programs share a block of the weight in the cache.
    blocks_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1)
    n = _unit(tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N), row, dp, 1, TILE)
    m_live, n_live = m < M, n < N
    start, first, last = _kept_tiles(offset, row, tl.cdiv(K, TILE), dp, keep)
    x_rows = x + m.to(tl.int64)[:, None] * x_stride
    w_columns = w + n.to(tl.int64)[None, :] * w_stride_n

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for place in range(first * TILE, last * TILE, BLOCK_K):
        k = _unit(place + tl.arange(0, BLOCK_K), start, dp, keep, TILE)
        k_live = k < K  # also masks positions beyond the last kept tile
        x_block = tl.load(x_rows + k[None, :], mask=m_live[:, None] & k_live[None, :], other=0.0)
        w_at = w_columns + k.to(tl.int64)[:, None] * w_stride_k
        w_block = tl.load(w_at, mask=k_live[:, None] & n_live[None, :], other=0.0)
        accumulator = tl.dot(x_block, w_block, accumulator, input_precision=PRECISION)

    accumulator *= scale
    if bias is not None:
        accumulator += tl.load(bias + n, mask=n_live, other=0.0).to(tl.float32)[None, :]
    y_at = y + m.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(y_at, accumulator.to(y.dtype.element_ty), mask=m_live[:, None] & n_live[None, :])


@autotune_product("BLOCK_N", "BLOCK_K", "BLOCK_M", key=_KEY)
@triton.jit(do_not_specialize=("M", "M_BUCKET", "dp", "keep"))
def weight_grad(
    dy, x, dw, offset, M, M_BUCKET, N, K, dp, keep, dy_stride, x_stride, dw_stride, scale,
    TILE: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Kept tiles of ``dw = scale * dy^T @ x``: one block of one class; nothing else is written."""
    row = tl.program_id(1)
    start, first, _ = _kept_tiles(offset, row, tl.cdiv(K, TILE), dp, keep)
    blocks_n = tl.cdiv(tl.cdiv(tl.cdiv(N, TILE), dp) * TILE, BLOCK_N)
    n = _unit(tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N), row, dp, 1, TILE)
    place = first * TILE + tl.program_id(0) // blocks_n * BLOCK_K + tl.arange(0, BLOCK_K)
    k = _unit(place, start, dp, keep, TILE)
    n_live, k_live = n < N, k < K

    accumulator = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m_start in range(0, M, BLOCK_M):
        m = m_start + tl.arange(0, BLOCK_M)
        m_live = m < M
        dy_at = dy + m.to(tl.int64)[None, :] * dy_stride + n[:, None]
        x_at = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
        dy_block = tl.load(dy_at, mask=n_live[:, None] & m_live[None, :], other=0.0)
        x_block = tl.load(x_at, mask=m_live[:, None] & k_live[None, :], other=0.0)
        accumulator = tl.dot(dy_block, x_block, accumulator, input_precision=PRECISION)

    dw_at = dw + n.to(tl.int64)[:, None] * dw_stride + k[None, :]
    tl.store(dw_at, (accumulator * scale).to(dw.dtype.element_ty), mask=n_live[:, None] & k_live[None, :])


def product_launch(
    x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, offset: Tensor, dp: int, keep: int, tile_size: int,
    scale: float,
) -> Launch:  # fmt: skip
    """Launch of ``y = scale * x @ (w * mask)^T + bias``; ``w`` may be a transposed view, with the same pattern."""
    (rows, n_in), n_out = x.shape, w.shape[0]
    tiles = triton.cdiv(n_out, tile_size)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        of_a_class = triton.cdiv(triton.cdiv(tiles, dp) * tile_size, meta["BLOCK_N"])
        return triton.cdiv(rows, meta["BLOCK_M"]) * of_a_class, min(dp, tiles)

    return Launch(
        product,
        grid,
        {
            "x": x, "w": w, "bias": bias, "y": y, "offset": offset, "M": rows, "M_BUCKET": bucket(rows), "N": n_out,
            "K": n_in, "dp": dp, "keep": keep, "x_stride": x.stride(0), "w_stride_n": w.stride(0),
            "w_stride_k": w.stride(1), "y_stride": y.stride(0), "scale": scale,
        },
        _constants(x, w, tile_size),
    )  # fmt: skip


def weight_grad_launch(
    dy: Tensor, x: Tensor, dw: Tensor, offset: Tensor, dp: int, keep: int, tile_size: int, scale: float
) -> Launch:
    """Launch of ``dw = scale * dy^T @ x``, kept tiles only."""
    rows, (n_out, n_in) = len(x), dw.shape
    tiles_out, tiles_in = triton.cdiv(n_out, tile_size), triton.cdiv(n_in, tile_size)
    most_kept = tiles_in // dp * keep + min(tiles_in % dp, keep)  # per row of tiles, over all offsets

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        blocks_n = triton.cdiv(triton.cdiv(tiles_out, dp) * tile_size, meta["BLOCK_N"])
        return blocks_n * triton.cdiv(most_kept * tile_size, meta["BLOCK_K"]), min(dp, tiles_out)

    return Launch(
        weight_grad,
        grid,
        {
            "dy": dy, "x": x, "dw": dw, "offset": offset, "M": rows, "M_BUCKET": bucket(rows), "N": n_out, "K": n_in,
            "dp": dp, "keep": keep, "dy_stride": dy.stride(0), "x_stride": x.stride(0), "dw_stride": dw.stride(0),
            "scale": scale,
        },
        _constants(x, dw, tile_size),
    )  # fmt: skip


def _constants(x: Tensor, w: Tensor, tile_size: int) -> dict[str, Any]:
    """Compile-time constants; ``ALIGNED`` says whether every row of tiles starts at a multiple of 16 bytes."""
    aligned = aligned_run(w.element_size(), *w.shape, tile_size) > 1
    return {"TILE": tile_size, "PRECISION": precision(x.dtype), "ALIGNED": aligned}


def specimens() -> list[Specimen]:
    """Specimens for ahead-of-time compilation: all tilings for tiles of 32, only the first for other sizes."""
    found = []
    for arch in ARCHS:
        for dtype in DTYPES:
            for tile_size, n_in in ((32, 1024), (16, 1024), (128, 1024), (32, 650)):
                for kind, launch in _example_launches(dtype, tile_size, n_in).items():
                    launch.constants["ARCH"] = arch
                    name = f"tile_{kind}_{tile_size}" + ("_ragged" if n_in == 650 else "")
                    every = specimens_of(name, launch, (arch,))
                    found += every if (tile_size, n_in) == (32, 1024) else every[:1]
    return found


def _example_launches(dtype: torch.dtype, tile_size: int, n_in: int) -> dict[str, Launch]:
    x, w, y = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((256, n_in), (2048, n_in), (256, 2048)))
    pattern = (torch.empty((), dtype=torch.int32, device="meta"), 2, 1, tile_size, 2.0)
    return {
        "forward": product_launch(x, w, y[0], y, *pattern),
        "input_grad": product_launch(y, w.t(), None, x, *pattern),
        "weight_grad": weight_grad_launch(y, x, w, *pattern),
    }
