"""Products over kept units as one batched product of packed operands: pack, multiply, unpack.

The batch is rearranged to ``[groups, rows of a group, units]``, with zero padding if group sizes differ. A layer then
takes three calls, whatever the number of groups: :func:`.pack_ops.pack` for the weight, ``torch.bmm``, and in the
backward pass :func:`.pack_ops.unpack`, which writes the dense gradient of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning.device import to_device
from approxdrop_lightning.ops.pack import pack_ops
from approxdrop_lightning.ops.pack.reference import slots
from approxdrop_lightning.ops.row_linear import reference
from approxdrop_lightning.patterns.row import RowPattern, row_groups


class IndexTable(NamedTuple):
    """The indices held by each group: rows of the batch, or units on one side of a layer.

    Attributes:
        table: ``[groups, most]``, int32, padded with -1.
        slots: Its inverse, ``[layers, n]`` (:func:`.pack.reference.slots`).
        counts: Number of indices in each group.
        run: Length of the aligned runs of consecutive indices that the table consists of.
    """

    table: Tensor
    slots: Tensor
    counts: tuple[int, ...]
    run: int


class _Grouping(NamedTuple):
    """Groups of the rows of a batch, and the number of layers that they form."""

    rows: IndexTable | None  # None: all rows are one group
    groups: int
    layers: int
    leading_shape: tuple[int, ...]

    @property
    def strided(self) -> bool:
        """Whether group ``g`` consists of every ``groups``-th row, starting with row ``g``."""
        return len(self.leading_shape) == 1 and self.leading_shape[0] > 0 and self.leading_shape[0] % self.groups == 0

    @property
    def row_counts(self) -> tuple[int, ...]:
        return (math.prod(self.leading_shape),) if self.rows is None else self.rows.counts


def _index_table(indices: Sequence[Tensor], n: int, layers: int, run: int, device: torch.device) -> IndexTable:
    counts = tuple(map(len, indices))
    if len(set(counts)) == 1:
        table = torch.stack(list(indices)).to(torch.int32)
    else:
        table = torch.nn.utils.rnn.pad_sequence(list(indices), batch_first=True, padding_value=-1).to(torch.int32)
    both = torch.cat([table.flatten(), slots(table, n, layers).flatten()])
    flat, inverse = to_device(both, device).split([table.numel(), layers * n])
    return IndexTable(flat.view(table.shape), inverse.view(layers, n), counts, run)


def _units(pattern: RowPattern | None, groups: int, layers: int, device: torch.device) -> IndexTable | None:
    """The units that each group keeps; None if it keeps all."""
    if pattern is None or pattern.keeps_all:
        return None
    indices = [pattern.units(g % pattern.n_groups).index for g in range(groups)]
    # The last block may come anywhere in the order: runs stay aligned only if its size is a multiple of theirs.
    run = math.gcd(pattern.block_size, pattern.n)
    return _index_table(indices, pattern.n, layers, run, device)


@lru_cache(maxsize=64)
def _rows(leading_shape: tuple[int, ...], groups: int, device: torch.device) -> IndexTable:
    indices = [rows.index for rows in row_groups(leading_shape, groups)]
    return _index_table(indices, math.prod(leading_shape), 1, 1, device)


def _grouping(
    patterns: Sequence[RowPattern | None], leading_shape: tuple[int, ...], device: torch.device
) -> _Grouping:
    skipping = [p for p in patterns if p is not None and not p.keeps_all]
    grouped = next((p for p in skipping if p.n_groups > 1), None)
    if grouped is None:
        return _Grouping(None, 1, 1, leading_shape)
    # The groups of one order hold disjoint units and form a layer, unless they overlap or share one side.
    disjoint = all(p.n_groups > 1 and not p.overlaps for p in skipping)
    layers = grouped.n_orders if disjoint else grouped.n_groups
    return _Grouping(_rows(leading_shape, grouped.n_groups, device), grouped.n_groups, layers, leading_shape)


def _group_dense(x: Tensor, grouping: _Grouping) -> Tensor:
    """Rows ``[R, n]`` arranged by group; a view if the groups are strided."""
    rows = grouping.rows
    if rows is None:
        return x[None]
    if grouping.strided:
        return x.unflatten(0, (-1, grouping.groups)).transpose(0, 1)
    return pack_ops.pack(x, rows.table, None, rows.slots, None)


def _ungroup_dense(y: Tensor, grouping: _Grouping) -> Tensor:
    rows = grouping.rows
    if rows is None:
        return y[0]
    if grouping.strided:
        return y.transpose(0, 1).flatten(0, 1)
    return pack_ops.unpack(y, rows.table, None, rows.slots, None, math.prod(grouping.leading_shape), y.shape[-1])


def _to_groups(values: Tensor, row_counts: Sequence[int], unit_counts: Sequence[int]) -> Tensor:
    """Arrange flat values, stored group after group, as ``[groups, most rows, most units]``."""
    rows, units = max(row_counts), max(unit_counts)
    sizes = list(zip(row_counts, unit_counts, strict=True))
    if all(size == (rows, units) for size in sizes):
        return values.reshape(len(sizes), rows, units)
    parts = values.reshape(-1).split([r * u for r, u in sizes])
    return torch.stack(
        [F.pad(part.view(r, u), (0, units - u, 0, rows - r)) for part, (r, u) in zip(parts, sizes, strict=True)]
    )


def _from_groups(values: Tensor, row_counts: Sequence[int], unit_counts: Sequence[int]) -> Tensor:
    """Inverse of :func:`_to_groups`."""
    if values.shape[1:] == (min(row_counts), min(unit_counts)):
        return values.reshape(-1)
    return torch.cat([v[:r, :u].reshape(-1) for v, r, u in zip(values, row_counts, unit_counts, strict=True)])


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """See :meth:`.RowLinearBackend.pack`."""
    grouping = _grouping([pattern], tuple(x.shape[:-1]), x.device)
    units, rows = _units(pattern, grouping.groups, grouping.layers, x.device), grouping.rows
    if units is None:
        return x.reshape(-1)
    row_slots = None if rows is None else _row_slots(rows, units, grouping)
    table = None if rows is None else rows.table
    values = pack_ops.pack(
        x.reshape(math.prod(x.shape[:-1]), pattern.n), table, units.table, row_slots, units.slots, units.run
    )
    return _from_groups(values, grouping.row_counts, units.counts)


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """See :meth:`.RowLinearBackend.unpack`."""
    grouping = _grouping([pattern], leading_shape, values.device)
    units, rows = _units(pattern, grouping.groups, grouping.layers, values.device), grouping.rows
    if units is None:
        return values.reshape(*leading_shape, pattern.n)
    row_slots = None if rows is None else _row_slots(rows, units, grouping)
    table = None if rows is None else rows.table
    packed = _to_groups(values, grouping.row_counts, units.counts)
    n_rows = math.prod(leading_shape)
    dense = pack_ops.unpack(packed, table, units.table, row_slots, units.slots, n_rows, pattern.n, units.run)
    return dense.view(*leading_shape, pattern.n)


def _row_slots(rows: IndexTable, units: IndexTable, grouping: _Grouping) -> Tensor:
    """Inverse of the table of rows, in as many layers as that of the units has; each row is in one of them."""
    if grouping.layers == 1:
        return rows.slots
    return _layered(grouping.leading_shape, grouping.groups, grouping.layers, rows.table.device)


@lru_cache(maxsize=64)
def _layered(leading_shape: tuple[int, ...], groups: int, layers: int, device: torch.device) -> Tensor:
    return slots(_rows(leading_shape, groups, device).table, math.prod(leading_shape), layers)


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_pattern: RowPattern | None,
    out_pattern: RowPattern | None,
    leading_shape: tuple[int, ...],
    scale: float = 1.0,
    activation: str = "identity",
) -> Tensor:
    """See :meth:`.RowLinearBackend.row_linear`."""
    n_in = weight.shape[1]
    grouping = _grouping([in_pattern, out_pattern], leading_shape, x.device)
    inside = _units(in_pattern, grouping.groups, grouping.layers, x.device)
    outside = _units(out_pattern, grouping.groups, grouping.layers, x.device)
    if inside is None and outside is None:
        return reference.finish(F.linear(x.reshape(math.prod(leading_shape), n_in), weight, bias), scale, activation)
    if inside is None:
        packed = _group_dense(x.reshape(math.prod(leading_shape), n_in), grouping)
    elif in_pattern is not None and in_pattern.n_groups == 1:  # rows keep their order
        packed = _group_dense(x.reshape(math.prod(leading_shape), inside.counts[0]), grouping)
    else:
        packed = _to_groups(x, grouping.row_counts, inside.counts)
    out_table, out_slots = (None, None) if outside is None else outside[:2]
    in_table, in_slots, run = (None, None, 1) if inside is None else (inside.table, inside.slots, inside.run)
    kept = pack_ops.pack(weight, out_table, in_table, out_slots, in_slots, run)
    y = torch.bmm(packed, kept.transpose(1, 2))
    if outside is None:
        y = _ungroup_dense(y, grouping)
        return reference.finish(y if bias is None else y + bias, scale, activation)
    if bias is not None:
        y = y + pack_ops.pack(bias[:, None], out_table, None, out_slots, None).transpose(1, 2)
    y = reference.finish(y, scale, activation)
    if out_pattern is not None and out_pattern.n_groups == 1:
        return _ungroup_dense(y, grouping)
    return _from_groups(y, grouping.row_counts, outside.counts)
