"""Products between regular patterns that the batch shares: ``W[offset_out::dp_out][:, offset_in::dp_in]``.

Kept rows of the weight lie ``dp * n_in`` apart: that is a row stride, and costs nothing. Kept columns lie ``dp``
elements apart, where no load can take 16 bytes: they are packed once per step (``docs/gpu_model.md`` counts the bytes
of this and of the alternatives), and all that follows reads the packed weight. So the products know strides only.

On sm90 and later operands come through tensor descriptors (TMA) where their rows are aligned to 16 bytes; else
through pointers, asynchronously.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from approxdrop_lightning.ops.triton.common import ARCHS, DTYPES, Specimen, Tiling, specimen, tilings
from approxdrop_lightning.ops.triton.launch import Launch, aligned_run, finish, precision, whole

_jit = triton.jit(
    do_not_specialize=(
        "M", "N", "K", "w_first", "w_stride", "out_offset", "out_dp", "in_offset", "in_dp", "packed_stride",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Units ``offset, offset + dp, ...`` of ``n``."""

    n: int
    dp: int
    offset: int

    @property
    def count(self) -> int:
        """How many they are."""
        return (self.n - self.offset + self.dp - 1) // self.dp


@_jit
def product(
    x, w, bias, y, z, M, N, K, w_first, w_stride, out_offset, out_dp, scale,
    FORWARD: tl.constexpr, DESCRIPTORS: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``y = act(scale * (x @ W^T + b))``; not ``FORWARD``: ``y = scale * x @ W``. The rows of ``W`` are strided."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    # Rows vary fastest: programs that run together read one tile of the weight, the larger operand, from the cache.
    m_first, n_first = (tl.program_id(0) % tiles_m) * BLOCK_M, (tl.program_id(0) // tiles_m) * BLOCK_N
    m, n = m_first + tl.arange(0, BLOCK_M), n_first + tl.arange(0, BLOCK_N)
    N, K = whole(N, Y_ALIGN), whole(K, X_ALIGN)
    m_live, n_live = m < M, n < N
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for start in range(0, K, BLOCK_K):
            if FORWARD:
                w_tile = w.load([n_first, start]).T
            else:
                w_tile = w.load([start, n_first])
            accumulator = tl.dot(x.load([m_first, start]), w_tile, accumulator, input_precision=PRECISION)
    else:
        w_stride = whole(w_stride.to(tl.int64), W_ALIGN)
        w += whole(w_first.to(tl.int64), W_ALIGN)
        x_rows = x + m.to(tl.int64) * K
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            k_live = k < K
            if FORWARD:
                w_at = w + n[None, :] * w_stride + k[:, None]
            else:
                w_at = w + k[:, None] * w_stride + n[None, :]
            x_tile = tl.load(x_rows[:, None] + k[None, :], mask=m_live[:, None] & k_live[None, :], other=0.0)
            w_tile = tl.load(w_at, mask=k_live[:, None] & n_live[None, :], other=0.0)
            accumulator = tl.dot(x_tile, w_tile, accumulator, input_precision=PRECISION)

    if bias is not None:
        kept_bias = tl.load(bias + out_offset + n * out_dp, mask=n_live, other=0.0)
        accumulator += kept_bias.to(tl.float32)[None, :]
    at = (m.to(tl.int64) * N)[:, None] + n[None, :]
    finish(accumulator * scale, y, z, at, m_live[:, None] & n_live[None, :], ACTIVATION)


@_jit
def weight_grad(
    dy, x, dw, M, N, K, out_offset, out_dp, in_offset, in_dp, w_stride, scale,
    DESCRIPTORS: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr,
    CONTIGUOUS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``dW[out_offset + n * out_dp, in_offset + k * in_dp] = scale * (dy^T @ x)[n, k]``.

    ``CONTIGUOUS``: all inputs are kept.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    n_first, k_first = (tl.program_id(0) % tiles_n) * BLOCK_N, (tl.program_id(0) // tiles_n) * BLOCK_K
    n, k = n_first + tl.arange(0, BLOCK_N), k_first + tl.arange(0, BLOCK_K)
    N, K = whole(N, Y_ALIGN), whole(K, X_ALIGN)
    n_live, k_live = n < N, k < K
    accumulator = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, M, BLOCK_M):
        if DESCRIPTORS:
            dy_tile, x_tile = dy.load([start, n_first]).T, x.load([start, k_first])
        else:
            m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
            m_live = m < M
            dy_at, x_at = dy + (m * N)[None, :] + n[:, None], x + (m * K)[:, None] + k[None, :]
            dy_tile = tl.load(dy_at, mask=n_live[:, None] & m_live[None, :], other=0.0)
            x_tile = tl.load(x_at, mask=m_live[:, None] & k_live[None, :], other=0.0)
        accumulator = tl.dot(dy_tile, x_tile, accumulator, input_precision=PRECISION)

    rows = (out_offset + n * out_dp) * whole(w_stride.to(tl.int64), W_ALIGN)
    if CONTIGUOUS:
        columns = k
    else:
        columns = in_offset + k * in_dp
    live = n_live[:, None] & k_live[None, :]
    tl.store(dw + rows[:, None] + columns[None, :], (accumulator * scale).to(dw.dtype.element_ty), mask=live)


@_jit
def pack(
    w, packed, N, K, out_offset, out_dp, in_offset, in_dp, w_stride, packed_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``packed[n, k] = W[out_offset + n * out_dp, in_offset + k * in_dp]``, zeros up to the end of a row."""
    packed_stride = whole(packed_stride, 16)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = (out_offset + n * out_dp) * w_stride.to(tl.int64)
    kept = (n < N)[:, None] & (k < K)[None, :]
    tile = tl.load(w + rows[:, None] + (in_offset + k * in_dp)[None, :], mask=kept, other=0.0)
    at = packed + n.to(tl.int64)[:, None] * packed_stride + k[None, :]
    tl.store(at, tile, mask=(n < N)[:, None] & (k < packed_stride)[None, :])


def aligned(values: Tensor, inside: Kept, outside: Kept) -> bool:
    """Whether all rows of a product's operands begin at multiples of 16 bytes."""
    return aligned_run(values.element_size(), inside.n, inside.count, outside.count) > 1


def packed_shape(inside: Kept, outside: Kept) -> tuple[int, int]:
    """Shape of a packed weight, whose rows are padded so that loads are aligned."""
    return outside.count, -(-inside.count // 16) * 16


def pack_launch(w: Tensor, packed: Tensor, inside: Kept, outside: Kept) -> Launch:
    """Copy the kept block of the weight ``w`` to ``packed``, of :func:`packed_shape`."""
    return Launch(
        pack,
        (triton.cdiv(outside.count, 32), triton.cdiv(packed.shape[1], 64)),
        {
            "w": w, "packed": packed, "N": outside.count, "K": inside.count,
            **_places(inside, outside), "w_stride": w.stride(0), "packed_stride": packed.stride(0),
        },
        {"BLOCK_N": 32, "BLOCK_K": 64},
    )  # fmt: skip


def product_launch(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    inside: Kept,
    outside: Kept,
    scale: float,
    tiling: Tiling,
    activation: str = "identity",
    forward: bool = True,
    descriptors: bool = False,
) -> Launch:
    """``y = act(scale * (x @ W[kept]^T + b[kept]))``, or not ``forward``: ``y = scale * x @ W[kept]``.

    Args:
        x: ``[M, inside.count]``, or ``[M, outside.count]`` backward.
        w: The weight; packed if inputs are dropped.
        bias: Dense, or None.
        y: What is written.
        z: Like ``y``, written for GELU: its argument; else None.
        inside: Kept inputs.
        outside: Kept outputs.
        scale: Factor.
        tiling: How it is cut.
        activation: One of :data:`.reference.ACTIVATIONS`.
        forward: Whether inputs are summed over; else outputs are.
        descriptors: Whether operands may come through tensor descriptors; they do if they are aligned.
    """
    (M, K), N = x.shape, y.shape[1]
    dense = (outside.n, inside.n) if forward else (inside.n, outside.n)
    tiles = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tiling.blocks(M, *dense), strict=True))
    # A packed weight has kept rows only.
    step, first = (1, 0) if inside.dp > 1 else (outside.dp, outside.offset)
    w_first, w_stride = first * w.stride(0), step * w.stride(0)
    runs = [aligned_run(x.element_size(), *numbers) for numbers in ((K,), (N,), (w_stride, w_first))]
    descriptors = descriptors and _describable(x, w) and min(runs[0], runs[2]) > 1 and min(M, N, K) > 0
    operands: tuple[Any, ...] = (x, w)
    if descriptors:
        shape, block = ((N, K), "NK") if forward else ((K, N), "KN")
        rows = w.as_strided(shape, (w_stride, 1), w.storage_offset() + w_first)
        operands = (
            TensorDescriptor.from_tensor(x, [tiles["BLOCK_M"], tiles["BLOCK_K"]]),
            TensorDescriptor.from_tensor(rows, [tiles[f"BLOCK_{letter}"] for letter in block]),
        )
    return Launch(
        product,
        (triton.cdiv(M, tiles["BLOCK_M"]) * triton.cdiv(N, tiles["BLOCK_N"]),),
        {
            "x": operands[0], "w": operands[1], "bias": bias, "y": y, "z": z, "M": M, "N": N, "K": K,
            "w_first": w_first, "w_stride": w_stride, "out_offset": outside.offset, "out_dp": outside.dp,
            "scale": scale,
        },
        {
            "FORWARD": forward, "DESCRIPTORS": descriptors, "X_ALIGN": runs[0], "Y_ALIGN": runs[1],
            "W_ALIGN": runs[2], "ACTIVATION": activation, "PRECISION": precision(x.dtype),
        } | tiles,
        tiling.num_warps, tiling.num_stages,
    )  # fmt: skip


def weight_grad_launch(
    dy: Tensor,
    x: Tensor,
    dw: Tensor,
    inside: Kept,
    outside: Kept,
    scale: float,
    tiling: Tiling,
    descriptors: bool = False,
) -> Launch:
    """Kept entries of the weight's gradient, ``scale * dy^T @ x``; the others of ``dw`` are not touched."""
    (M, N), K = dy.shape, x.shape[1]
    tiles = dict(zip(("BLOCK_N", "BLOCK_K", "BLOCK_M"), tiling.blocks(outside.n, inside.n, M), strict=True))
    runs = [aligned_run(x.element_size(), number) for number in (K, N, dw.stride(0))]
    descriptors = descriptors and _describable(dy, x) and min(runs[:2]) > 1 and min(M, N, K) > 0
    operands: tuple[Any, ...] = (dy, x)
    if descriptors:
        operands = tuple(
            TensorDescriptor.from_tensor(values, [tiles["BLOCK_M"], tiles[f"BLOCK_{letter}"]])
            for values, letter in ((dy, "N"), (x, "K"))
        )
    return Launch(
        weight_grad,
        (triton.cdiv(N, tiles["BLOCK_N"]) * triton.cdiv(K, tiles["BLOCK_K"]),),
        {
            "dy": operands[0], "x": operands[1], "dw": dw, "M": M, "N": N, "K": K,
            **_places(inside, outside), "w_stride": dw.stride(0), "scale": scale,
        },
        {
            "DESCRIPTORS": descriptors, "X_ALIGN": runs[0], "Y_ALIGN": runs[1], "W_ALIGN": runs[2],
            "CONTIGUOUS": inside.dp == 1, "PRECISION": precision(x.dtype),
        } | tiles,
        tiling.num_warps, tiling.num_stages,
    )  # fmt: skip


def _places(inside: Kept, outside: Kept) -> dict[str, int]:
    return {
        "out_offset": outside.offset, "out_dp": outside.dp, "in_offset": inside.offset, "in_dp": inside.dp,
    }  # fmt: skip


def _describable(*operands: Tensor) -> bool:
    return all(operand.data_ptr() % 16 == 0 for operand in operands)


def specimens() -> list[Specimen]:
    """What is compiled ahead of time: all ways to cut it, operands by pointer and, from sm90 on, by descriptor."""
    found = []
    for arch in ARCHS:
        for dtype in DTYPES:
            for tiling in tilings(arch, dtype):
                for descriptors in (False, True) if arch >= 90 else (False,):
                    blocks = "x".join(map(str, tiling[:3]))
                    way = "descriptor" if descriptors else "pointer"
                    found += [
                        specimen(f"row_{kind}_{way}_{blocks}", launch, (arch,))
                        for kind, launch in _example_launches(dtype, tiling, descriptors).items()
                    ]
            found += [
                specimen(f"row_{kind}_ragged", launch, (arch,))
                for kind, launch in _example_launches(
                    dtype, tilings(arch, dtype, aligned=False)[0], False, 650
                ).items()
            ]
    return found


def _example_launches(dtype: torch.dtype, tiling: Tiling, descriptors: bool, n: int = 2048) -> dict[str, Launch]:
    inside, outside = Kept(n, 2, 1), Kept(n, 2, 0)
    w, x = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((n, n), (256, n // 2)))
    packed, y = w.new_empty(packed_shape(inside, outside)), torch.empty_like(x)
    sides = (inside, outside, 2.0, tiling)
    return {
        "pack": pack_launch(w, packed, inside, outside),
        "forward": product_launch(x, packed, w[0], y, y, *sides, "gelu", descriptors=descriptors),
        "input_grad": product_launch(y, packed, None, x, None, *sides, forward=False, descriptors=descriptors),
        "weight_grad": weight_grad_launch(y, x, w, *sides, descriptors=descriptors),
    }
