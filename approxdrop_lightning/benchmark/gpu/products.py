"""Parts 2 and 3: vendor products of packed operands, and the kernels that pack and unpack."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from approxdrop_lightning.benchmark.gpu.measuring import (
    BLOCK,
    PATTERNS,
    RATES,
    Case,
    Row,
    Scale,
    dtype_of,
    pattern_tables,
    seconds_of,
)
from approxdrop_lightning.ops.pack import pack_ops, reference


def product_cases(device: str, scale: Scale) -> Iterator[Case]:
    """Cases of part 2."""
    for n in scale.widths:
        for rows in scale.rows:
            for name in scale.dtypes:
                dense: dict[str, float] = {}
                for rate in RATES:
                    what = {"width": n, "rows": rows, "dtype": name, "rate": rate}
                    yield what, partial(_product, n, rows, name, rate, dense, device, scale)


def _product(
    n: int, rows: int, name: str, rate: float, dense: dict[str, float], device: str, scale: Scale
) -> Row:  # fmt: skip
    """Forward product and both gradients; the dense ones are timed once for all rates."""
    dtype = dtype_of(name)
    x, dy, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, n), (rows, n), (n, n)))
    if not dense:
        dense["ms"] = 1e3 * seconds_of(lambda: (x @ weight.t(), dy @ weight, dy.t() @ x), device, scale)
    groups, share = PATTERNS[rate]
    kept = round(n // BLOCK * share) * BLOCK
    # Packed activations as a layer before makes them: [groups, rows, kept], rows of a group contiguous.
    packed, d_packed = (torch.randn(groups, rows // groups, kept, device=device).to(dtype) for _ in range(2))
    part = torch.randn(groups, kept, kept, device=device).to(dtype)

    def both_sides() -> Any:
        return torch.bmm(packed, part.mT), torch.bmm(d_packed, part), torch.bmm(d_packed.mT, packed)

    # One side: rows of a group are every groups-th row of a dense tensor.
    strided = x[: rows - rows % groups].view(-1, groups, n).transpose(0, 1)
    wide = torch.randn(groups, kept, n, device=device).to(dtype)

    def outputs_only() -> Any:
        return torch.bmm(strided, wide.mT), torch.bmm(d_packed, wide), torch.bmm(d_packed.mT, strided)

    both, one = (1e3 * seconds_of(run, device, scale) for run in (both_sides, outputs_only))
    saved = groups * (rows // groups) * kept * kept / (rows * n * n)
    return {
        "mm_ms": dense["ms"],
        "bmm_both_sides_ms": both,
        "bmm_outputs_ms": one,
        "times_as_fast": dense["ms"] / both,
        "ideal": 1 / saved,
        "mm_tflops": 6e-9 * rows * n * n / dense["ms"],
        "bmm_tflops": 6e-9 * rows * n * n * saved / both,
    }


def copy_cases(device: str, scale: Scale) -> Iterator[Case]:
    """Cases of part 3."""
    peak: dict[str, float] = {}
    for n in scale.widths:
        for name in ("bf16", "fp32") if device == "cuda" else ("fp32",):
            for rate in RATES:
                for what in ("weight", "activations"):
                    case = {"what": what, "width": n, "dtype": name, "rate": rate}
                    yield case, partial(_copy, what, n, name, rate, peak, device, scale)


def _copy(what: str, n: int, name: str, rate: float, peak: dict[str, float], device: str, scale: Scale) -> Row:
    dtype = dtype_of(name)
    if not peak:
        large = torch.empty(2**29 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
        other = torch.empty_like(large)
        peak["gb_s"] = 2e-9 * large.numel() / seconds_of(lambda: other.copy_(large), device, scale)
    m = n
    tables = pattern_tables(n, n, rate, device)
    if what == "activations":
        groups = len(tables[0])
        m = scale.rows[0] - scale.rows[0] % groups
        of_group = torch.arange(m, device=device, dtype=torch.int32).view(-1, groups).t().contiguous()
        layers = len(tables[3])
        tables = (of_group, tables[1], reference.slots(of_group, m, layers), tables[3])
    dense = torch.randn(m, n, device=device).to(dtype)
    packed = pack_ops.pack(dense, *tables, BLOCK)
    moved = packed.numel() * dtype.itemsize
    packing = seconds_of(lambda: pack_ops.pack(dense, *tables, BLOCK), device, scale)
    unpacking = seconds_of(lambda: pack_ops.unpack(packed, *tables, m, n, BLOCK), device, scale)
    pack_gb, unpack_gb = 2e-9 * moved / packing, 1e-9 * (moved + dense.numel() * dtype.itemsize) / unpacking
    return {
        "pack_us": 1e6 * packing,
        "unpack_us": 1e6 * unpacking,
        "pack_gb_s": pack_gb,
        "unpack_gb_s": unpack_gb,
        "copy_gb_s": peak["gb_s"],
        "pack_of_copy": pack_gb / peak["gb_s"],
        "unpack_of_copy": unpack_gb / peak["gb_s"],
    }
