"""The static part of a pattern in a compiled graph, and the mask that a pattern stands for.

A compiled graph has fixed shapes, so the number of kept units is static. *Which* units are kept is data: permutations
in device memory, written before each batch.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from approxdrop_lightning.patterns.sampler import fitting_block_size


class Layout(NamedTuple):
    """Sizes of a pattern of ``n`` units, divided into ``blocks`` of ``block`` units each.

    Each of the ``orders`` permutations of the blocks serves ``groups`` groups of rows. Group ``g`` of an order keeps
    the blocks at its places ``[g * shift, g * shift + kept)``. If ``keep / dp`` of the blocks is not a whole number,
    the last of these places is *spare*: it is computed in every batch, but is zero in as many of them as it takes for
    every unit to be kept with a probability of exactly ``keep / dp``.
    """

    n: int
    block: int
    kept: int
    groups: int
    shift: int
    orders: int = 1
    spare: bool = False

    @property
    def blocks(self) -> int:
        return self.n // self.block

    @property
    def width(self) -> int:
        """Units computed for each row."""
        return self.kept * self.block

    @property
    def all_groups(self) -> int:
        return self.groups * self.orders

    @property
    def disjoint(self) -> bool:
        """Whether no two groups of one order keep the same block."""
        return self.groups == 1 or self.shift >= self.kept

    @property
    def segments(self) -> list[slice]:
        """Ranges of places that are kept by the same groups in the same batches, so that their blocks may swap."""
        firsts = [group * self.shift for group in range(self.groups)]
        ends = [first + self.kept for first in firsts]
        spare = [end - 1 for end in ends] if self.spare else []
        bounds = sorted({0, self.blocks, *firsts, *ends, *spare})
        return [slice(first, end) for first, end in pairwise(bounds) if end - first > 1]

    @property
    def size(self) -> int:
        """Size of its table: place of each block, block at each place, and the number of kept places."""
        return 2 * self.orders * self.blocks + 1


def layout_of(
    n: int,
    dp: int,
    keep: int,
    *,
    interleave: bool = True,
    block_size: int = 16,
    shuffle: bool = True,
    orders: int = 1,
) -> Layout:
    """The layout that keeps ``keep / dp`` of ``n`` units.

    Args:
        n: Number of units, >= 1.
        dp: Period, >= 1.
        keep: Number of kept cells, in [1, dp].
        interleave: Whether the rows of a batch keep different units.
        block_size: Most units of a block; halved until the blocks have one size and a cell has four of them.
        shuffle: Whether blocks are permuted; if not, they are single units.
        orders: Number of orders that rows alternate between; 1 unless ``interleave`` and ``shuffle``.

    Returns:
        The layout. The number of groups depends on the pair only, so that the groups of all layers line up.
    """
    block = fitting_block_size(n, dp, block_size) if shuffle else 1
    while n % block:
        block //= 2
    blocks = n // block
    kept, spare = -(-blocks * keep // dp), blocks * keep % dp != 0
    groups = 1 if not interleave or keep == dp else 2 if 2 * keep > dp else dp // keep
    shift = kept
    if groups > 1 and groups * kept > blocks:
        shift = (blocks - kept) // (groups - 1)
    return Layout(n, block, kept, groups, shift, orders if groups > 1 and shuffle else 1, spare)


def share_of_spare(layout: Layout, dp: int, keep: int) -> float:
    """Share of the batches in which the spare place is kept."""
    return (layout.blocks * keep % dp) / dp


class TableUse(NamedTuple):
    """One use of a dropout: offset of its pattern in the table, factor of kept values, and layout.

    The layout is flattened into fields because arguments in graphs cannot be nested tuples.
    """

    at: int
    scale: float
    n: int
    block: int
    kept: int
    groups: int
    shift: int
    orders: int
    spare: bool

    @property
    def layout(self) -> Layout:
        return Layout(*self[2:])

    def place(self, table: Tensor) -> Tensor:
        """``[orders, blocks]``: the place of each block."""
        n = self.layout.orders * self.layout.blocks
        return table[self.at : self.at + n].view(self.layout.orders, self.layout.blocks)

    def block_at(self, table: Tensor) -> Tensor:
        """``[orders, blocks]``: the block at each place."""
        n = self.layout.orders * self.layout.blocks
        return table[self.at + n : self.at + 2 * n].view(self.layout.orders, self.layout.blocks)

    def active(self, table: Tensor) -> Tensor:
        """``[1]``: number of places that each group keeps: all of them, or all but the spare one."""
        end = self.at + self.layout.size
        return table[end - 1 : end]

    def kept_blocks(self, table: Tensor) -> Tensor:
        """``[all groups, kept]``: blocks that each group computes."""
        s, block_at = self.layout, self.block_at(table)
        if s.shift == 0 or s.groups == 1:
            windows = block_at[:, None, : s.kept].expand(-1, s.groups, -1)
        elif s.shift == s.kept:
            windows = block_at[:, : s.groups * s.kept]
        else:
            windows = block_at.unfold(1, s.kept, s.shift)[:, : s.groups]
        return windows.reshape(s.all_groups, s.kept)

    def factors(self, table: Tensor, dtype: torch.dtype) -> Tensor | float:
        """Factor of the computed values: a number, or ``[width]`` if there is a spare place."""
        s = self.layout
        if not s.spare:
            return self.scale
        kept = torch.arange(s.kept, device=table.device) < self.active(table)
        return (kept.to(dtype) * self.scale)[:, None].expand(-1, s.block).reshape(s.width)

    def keeps(self, table: Tensor) -> Tensor:
        """``[all groups, blocks]``: whether each group keeps each block."""
        s = self.layout
        first = s.shift * torch.arange(s.groups, device=table.device)
        at = self.place(table)[:, None, :] - first[:, None]
        last = self.active(table) if s.spare else s.kept
        return ((at >= 0) & (at < last)).view(s.all_groups, s.blocks)


class Rows(NamedTuple):
    """Assignment of rows to groups: row ``r`` of the flattened, padded batch is in group ``r % groups``.

    The last leading dimension is padded by ``pad`` rows, so that a sample of ``[T, B, n]`` is not in the same group
    at every time step.
    """

    groups: int
    pad: int = 0


def rows_of(groups: int, leading: tuple[int, ...]) -> Rows:
    """Assign the rows of a batch of this leading shape to groups."""
    if groups == 1 or len(leading) < 2:
        return Rows(groups)
    run = leading[-1]
    pad = next((p for p in range(groups) if math.gcd(run + p, groups) <= max(1, groups // 4)), 0)
    return Rows(groups, pad)


def group_of_row(leading: tuple[int, ...], rows: Rows) -> Tensor:
    """Group of each row of a batch: int64, ``leading``."""
    run = leading[-1] if leading else 1
    index = torch.arange(math.prod(leading), device="cpu")
    if rows.pad:
        index = index + rows.pad * (index // run)
    return index.remainder(rows.groups).view(leading)


def mask_of(use: TableUse, table: Tensor, rows: Rows, leading: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The definition of a pattern: ``[*leading, n]``, the scale where a row keeps a unit, zero elsewhere."""
    s = use.layout
    keeps = use.keeps(table).repeat_interleave(s.block, 1)
    return keeps[group_of_row(leading, rows).to(table.device).view(-1)].view(*leading, s.n).to(dtype) * use.scale
