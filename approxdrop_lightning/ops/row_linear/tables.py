"""What grouped kernels are told about patterns: small tables of integers, built on the host, copied without waiting.

No kernel takes the place of a unit or the size of a group as an argument: all of that is in these tables. So a launch
depends only on shapes and on ``(dp, keep)``, and whoever replays a captured CUDA graph changes the pattern by copying
another table into the captured one.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from approxdrop_lightning.device import to_device
from approxdrop_lightning.patterns.row import RowPattern

#: Fields of a group: first row in the table of rows, rows, first row of its block of a packed weight; then of the
#: inputs and of the outputs: first unit in the table of units, units, where its values begin.
GROUP_FIELDS = 9
#: Fields of a block of the weight: first output unit, outputs, first input unit, inputs, first and last group (not
#: included) that keep it.
PAIR_FIELDS = 6
#: Fields of a segment of the outputs: first unit, units, first and last group that keep it.
SEGMENT_FIELDS = 4
#: Bytes of the widest load.
LOAD_BYTES = 16


class Sizes(NamedTuple):
    """Integers that a launch needs beside the tables; only ``multiplies`` may change while ``(dp, keep)`` does not.

    Attributes:
        groups: Groups of rows.
        n_in: Inputs, kept or not.
        n_out: Outputs, kept or not.
        in_by_group: Whether the inputs' values are packed by group; else they are rows in their order.
        out_by_group: The same of the outputs.
        in_run: How many kept inputs lie together in the weight, aligned, as far as a load can gain from it; 0 if all
            are kept in their order.
        out_run: The same of the outputs.
        in_align: What divides every width and offset of the inputs' values, as far as a load can gain from it.
        out_align: The same of the outputs.
        most_rows: Bound of the rows of a group.
        most_in: Bound of the inputs of a group.
        most_out: Bound of the outputs of a group.
        multiplies: Multiplies of the product.
    """

    groups: int
    n_in: int
    n_out: int
    in_by_group: int
    out_by_group: int
    in_run: int
    out_run: int
    in_align: int
    out_align: int
    most_rows: int
    most_in: int
    most_out: int
    multiplies: int
    orders: int


class Tables(NamedTuple):
    """Tables on the device, int64.

    Attributes:
        rows: Rows of the batch, group after group.
        groups: ``[groups * GROUP_FIELDS]``.
        pairs: ``[pairs * PAIR_FIELDS]``: blocks that the weight falls into, each kept by a range of groups. No two
            of them have an entry in common, if they are of one order; those of each order are as many, one after the
            other.
        segments: ``[segments * SEGMENT_FIELDS]``: the same of the outputs alone.
        in_units: First unit of each run of ``in_run`` kept inputs; empty if all are kept in their order.
        out_units: The same of the outputs.
    """

    rows: Tensor
    groups: Tensor
    pairs: Tensor
    segments: Tensor
    in_units: Tensor
    out_units: Tensor


class Plan(NamedTuple):
    """All that the ops of one product need beside its operands.

    Attributes:
        tables: Views of ``flat``, but for ``rows``, which does not depend on what is drawn.
        sizes: See :class:`Sizes`.
        in_shape: Shape of the inputs' values.
        out_shape: Shape of the outputs' values.
        flat: The memory of the tables.
    """

    tables: Tables
    sizes: Sizes
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    flat: Tensor


class _Side:
    """Inputs or outputs: where each group's units lie in a list of all that some group keeps."""

    def __init__(self, pattern: RowPattern | None, n: int, groups: int, item_bytes: int) -> None:
        widest = LOAD_BYTES // item_bytes
        self.by_group = groups == 1 or (pattern is not None and pattern.n_groups > 1)
        if pattern is None:
            self.run, self.align = 0, widest if n % widest == 0 else 1
            self.starts = torch.empty(0, dtype=torch.int64, device="cpu")
            self.places, self.most = [slice(0, n)] * groups, n
            return
        # Then every cell is a whole number of runs, and so is every width and offset of packed values.
        self.run = widest if n % widest == 0 and pattern.block_size % widest == 0 else 1
        equal_cells = n % (pattern.block_size * pattern.dp) == 0
        self.align = widest if equal_cells and n // pattern.dp % widest == 0 else self.run
        self.places, units, end = [], [], 0
        for part in pattern.by_order:
            for g in range(part.n_groups):
                kept = part.units(g)
                # Units that two groups keep are the last ones of the one and the first ones of the other.
                again = part.common.count if g and part.overlaps else 0
                self.places.append(slice(end - again, end - again + kept.count))
                units.append(kept.index[again:])
                end += kept.count - again
        self.starts = torch.cat(units)[:: self.run]
        if len(self.places) == 1:
            self.places *= groups
        self.most = min(n, pattern.keep * -(-pattern.n_blocks // pattern.dp) * pattern.block_size)

    @property
    def widths(self) -> list[int]:
        return [place.stop - place.start for place in self.places]

    def segments(self) -> list[tuple[int, int, int, int]]:
        """Runs of units that the same groups keep: first unit, units, first and last group (not included)."""
        found = []
        for first, last in pairwise(sorted({end for p in self.places for end in (p.start, p.stop)})):
            kept_by = [g for g, p in enumerate(self.places) if p.start <= first and last <= p.stop]
            if kept_by:
                found.append((first, last - first, kept_by[0], kept_by[-1] + 1))
        return found

    def shape(self, rows: list[int]) -> tuple[int, ...]:
        if self.by_group and len(rows) > 1:
            return (sum(r * w for r, w in zip(rows, self.widths, strict=True)),)
        return sum(rows), self.widths[0]


def make_plan(
    in_pattern: RowPattern | None,
    out_pattern: RowPattern | None,
    leading_shape: tuple[int, ...],
    weight: Tensor,
) -> Plan:
    """Tables of a product between two patterns.

    Args:
        in_pattern: What is kept of the inputs, or None for all.
        out_pattern: What is kept of the outputs, or None for all. If both are interleaved, they have the same number
            of groups.
        leading_shape: Shape of the batch.
        weight: ``[n_out, n_in]``; only its shape, type and device are used.

    Returns:
        The plan, on the device of the weight.
    """
    grouped = next((p for p in (in_pattern, out_pattern) if p is not None and p.n_groups > 1), None)
    groups = 1 if grouped is None else grouped.n_groups
    n_out, n_in = weight.shape
    inside = _Side(in_pattern, n_in, groups, weight.element_size())
    outside = _Side(out_pattern, n_out, groups, weight.element_size())
    rows = [r.count for r in (grouped or RowPattern(1, 1, 0)).row_groups(leading_shape)]

    records = zip(
        _before(rows), rows, _before([outside.most] * groups),
        (p.start for p in inside.places), inside.widths, _values_before(inside, rows),
        (p.start for p in outside.places), outside.widths, _values_before(outside, rows),
        strict=True,
    )  # fmt: skip
    pairs = [
        (*out[:2], *into[:2], max(out[2], into[2]), min(out[3], into[3]))
        for out in outside.segments()
        for into in inside.segments()
        if max(out[2], into[2]) < min(out[3], into[3])
    ]
    lists = [[field for record in part for field in record] for part in (records, pairs, outside.segments())]
    parts = [*(torch.tensor(part, device="cpu") for part in lists), inside.starts, outside.starts]
    flat = to_device(torch.cat([part.to(torch.int64) for part in parts]), weight.device)
    multiplies = sum(r * i * o for r, i, o in zip(rows, inside.widths, outside.widths, strict=True))
    return Plan(
        Tables(
            _rows(leading_shape, groups, weight.device), *flat.split([part.numel() for part in parts])
        ),
        Sizes(
            groups, n_in, n_out, int(inside.by_group), int(outside.by_group),
            inside.run, outside.run, inside.align, outside.align, max(rows), inside.most, outside.most, multiplies,
            1 if grouped is None else grouped.n_orders,
        ),
        inside.shape(rows),
        outside.shape(rows),
        flat,
    )  # fmt: skip


def _before(counts: list[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]


def _values_before(side: _Side, rows: list[int]) -> list[int]:
    return _before([r * w for r, w in zip(rows, side.widths, strict=True)]) if side.by_group else [0] * len(rows)


@lru_cache(maxsize=64)
def _rows(leading_shape: tuple[int, ...], groups: int, device: torch.device) -> Tensor:
    like = RowPattern(1, groups, 0, interleave=groups > 1)
    return to_device(like.row_order(leading_shape), device)
