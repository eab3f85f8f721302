"""The pack and unpack kernels in compiled graphs on CUDA, visible to the compiler as two launches.

The gathers that inductor generates instead copy single elements, at a quarter of the memory bandwidth.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.graph.layout import TableUse
from approxdrop_lightning.ops.pack.pack_ops import has_kernel

#: Smallest weight for which the kernel is worth a launch that is not fused.
LEAST = 1 << 18


def serves(weight: Tensor) -> bool:
    """Whether the kernels support a weight and are faster."""
    return weight.is_cuda and weight.numel() >= LEAST and has_kernel(weight)


def pack(weight: Tensor, table: Tensor, outside: TableUse | None, inside: TableUse | None) -> Tensor:
    """The submatrix of a weight for each group, ``[groups, outputs, inputs]``."""
    from approxdrop_lightning.ops.pack import triton_pack

    rows, columns = (None if use is None else _units(use, table) for use in (outside, inside))
    some = rows if rows is not None else columns
    assert some is not None
    n_out = weight.shape[0] if rows is None else rows.shape[1]
    n_in = weight.shape[1] if columns is None else columns.shape[1]
    packed = weight.new_empty(some.shape[0], n_out, n_in)
    run = 1 if inside is None else inside.block
    _run(triton_pack.pack_launch(weight.contiguous(), packed, rows, columns, run))
    return packed


def unpack(
    packed: Tensor, table: Tensor, outside: TableUse | None, inside: TableUse | None, shape: tuple[int, int]
) -> Tensor:
    """Gradient of :func:`pack`: the dense sum over groups."""
    from approxdrop_lightning.ops.pack import triton_pack

    disjoint = all(use is None or use.layout.disjoint for use in (outside, inside))
    rows, columns = (None if use is None else _slots(use, table, disjoint) for use in (outside, inside))
    dense = packed.new_empty(shape)
    run = 1 if inside is None else inside.block
    _run(triton_pack.unpack_launch(packed.contiguous(), dense, rows, columns, run))
    return dense


def _units(use: TableUse, table: Tensor) -> Tensor:
    """``[groups, width]``: kept units, int32."""
    within = torch.arange(use.block, device=table.device)
    units = use.kept_blocks(table)[:, :, None] * use.block + within
    return units.view(use.layout.all_groups, use.layout.width).to(torch.int32)


def _slots(use: TableUse, table: Tensor, disjoint: bool) -> Tensor:
    """Inverse of :func:`_units`, ``[layers, n]``, as :func:`.ops.pack.reference.slots` defines it."""
    s, place = use.layout, use.place(table)
    order = torch.arange(s.orders, device=table.device)[:, None]
    if disjoint:  # the groups of one order form a layer
        kept, slot = place < s.groups * s.kept, order * (s.groups * s.kept) + place
    else:
        group = torch.arange(s.groups, device=table.device)[:, None]
        at = place[:, None, :] - s.shift * group
        kept = (at >= 0) & (at < s.kept)
        slot = (order[:, :, None] * s.groups + group) * s.kept + at
    kept, slot = kept.reshape(-1, s.blocks, 1), slot.reshape(-1, s.blocks, 1)
    within = torch.arange(s.block, device=table.device)
    return torch.where(kept, slot * s.block + within, -1).view(-1, s.n).to(torch.int32)


def _run(launch: Any) -> None:
    if not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack():
        launch.run()
        return
    wrapped = torch.library.wrap_triton(_untuned(launch.kernel))
    wrapped[launch.grid](**launch.arguments, **launch.constants)


@cache
def _untuned(kernel: Any) -> Any:
    """A kernel with its first configuration only, so that the compiler does not tune it again for each graph."""
    import triton

    return triton.autotune(kernel.configs[:1], key=[])(kernel.fn)
