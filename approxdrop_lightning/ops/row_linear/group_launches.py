"""Launches of the kernels for grouped products: what of the plan goes where, and what is compiled ahead of time."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from approxdrop_lightning.ops.row_linear.tables import PAIR_FIELDS, SEGMENT_FIELDS, Sizes, Tables, make_plan
from approxdrop_lightning.ops.row_linear.triton_groups import bias_grad, copy, pack, product, weight_grad
from approxdrop_lightning.ops.triton.common import ARCHS, DTYPES, Specimen, Tiling, specimen, tilings
from approxdrop_lightning.ops.triton.launch import Launch, aligned_run, precision
from approxdrop_lightning.patterns.row import RowPattern


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
