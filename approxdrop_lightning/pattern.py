"""Patterns: frozen values that say which units of a layer are kept, and by which rows of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowPattern:
    """Row-based dropout pattern of ``n`` units (Song et al., DATE 2019, section 3.1, and beyond).

    The units are divided into ``dp`` cells, ``keep`` of which are kept. Unit ``j`` lies in the cell
    ``c(j) = order[j // block_size] mod dp`` (natural order: ``c(j) = j // block_size mod dp``). Group ``g``
    keeps the cells ``(offset + g + i) mod dp`` for ``i < keep``. A shared pattern has the one group 0; an
    interleaved one has ``dp`` groups, and the row of a batch with leading indices ``(t, b, ...)`` belongs to
    group ``(t + b + ...) mod dp``.

    Because ``offset`` is uniform over ``dp`` values, every unit is kept with probability exactly
    ``keep / dp``, also where ``dp`` does not divide ``n``.

    Attributes:
        n: Number of units, >= 1.
        dp: Period, number of cells, >= 1. Cells are empty where ``dp`` exceeds the number of blocks.
        offset: First kept cell of group 0, in [0, dp).
        keep: Number of kept cells, in [1, dp].
        interleave: Whether rows of the batch take the cells in turn.
        order: Permutation of the ``ceil(n / block_size)`` blocks (int64 tensor or sequence), or None for the
            natural order.
        block_size: Units per block, >= 1. The last block may be smaller.

    Raises:
        ValueError: An argument is outside of its range.
    """

    n: int
    dp: int
    offset: int
    keep: int = 1
    interleave: bool = False
    order: Tensor | None = None
    block_size: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (
            ("n", 1, math.inf),
            ("dp", 1, math.inf),
            ("offset", 0, self.dp - 1),
            ("keep", 1, self.dp),
            ("block_size", 1, math.inf),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"RowPattern: {name} must be an integer in [{low}, {high}], got {value!r}")
        if self.order is not None:
            order = torch.as_tensor(self.order, dtype=torch.int64, device="cpu")
            if order.shape != (self.n_blocks,) or not torch.equal(order.sort().values, torch.arange(self.n_blocks)):
                raise ValueError(f"RowPattern: order must be a permutation of {self.n_blocks} blocks, got {order}")
            object.__setattr__(self, "order", order)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowPattern) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @cached_property
    def _key(self) -> tuple[object, ...]:
        order = None if self.order is None else tuple(self.order.tolist())
        return (self.n, self.dp, self.offset, self.keep, self.interleave, order, self.block_size)

    @property
    def n_blocks(self) -> int:
        """Number of blocks of units, the last of which may be smaller."""
        return -(-self.n // self.block_size)

    @property
    def n_groups(self) -> int:
        """Number of groups of rows: ``dp`` if interleaved, else 1."""
        return self.dp if self.interleave else 1

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped."""
        return self.keep == self.dp

    def cells(self) -> tuple[Tensor, ...]:
        """Kept indices of each group: ``n_groups`` int64 tensors.

        Ascending within a cell; a group that keeps several cells has them one after the other, the first kept one
        first. Group 0 of a shared pattern is ascending as a whole.
        """
        return self._cells

    @cached_property
    def _cells(self) -> tuple[Tensor, ...]:
        if not self.interleave:
            cells = [self.by_cell[(self.offset + i) % self.dp] for i in range(self.keep)]
            return (torch.cat(cells).sort().values if self.keep > 1 else cells[0],)
        around = self.by_cell * 2
        starts = [(self.offset + g) % self.dp for g in range(self.dp)]
        if self.keep == 1:
            return tuple(around[start] for start in starts)
        return tuple(torch.cat(around[start : start + self.keep]) for start in starts)

    @cached_property
    def by_cell(self) -> tuple[Tensor, ...]:
        """Units of each of the ``dp`` cells, ascending: int64."""
        if self.order is None:
            return _natural_cells(self.n, self.dp, self.block_size)
        cell = self.order.remainder(self.dp)
        if self.block_size > 1:
            cell = cell.repeat_interleave(self.block_size)[: self.n]
        units = cell.sort(stable=True).indices
        return units.split(torch.bincount(cell, minlength=self.dp).tolist())

    @property
    def kept(self) -> Tensor:
        """Kept indices of group 0 (of every row, if the pattern is shared): int64."""
        return self._cells[0]

    @property
    def n_kept(self) -> int:
        """Number of units that group 0 keeps."""
        return self.kept.numel()

    @property
    def share(self) -> float:
        """Share of the units kept: of all groups together if interleaved."""
        return self.keep / self.dp if self.interleave else self.n_kept / self.n

    def stride(self, group: int) -> slice | None:
        """The kept indices of a group as a slice, where they are one: natural order, one kept unit in dp."""
        if self.order is None and self.keep == 1 and self.block_size == 1:
            return slice((self.offset + group) % self.dp, None, self.dp)
        return None

    def row_groups(self, leading_shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Rows of each group: int64 indices into the flattened leading dimensions, ascending."""
        return _row_groups(tuple(leading_shape), self.n_groups)

    def flat_index(self, leading_shape: tuple[int, ...]) -> Tensor:
        """Where the packed values lie in a contiguous ``[*leading_shape, n]``: int64, group after group."""
        if self._flat_index_of and self._flat_index_of[0] == leading_shape:
            return self._flat_index_of[1]
        rows = self.row_groups(leading_shape)
        index = torch.cat([(r[:, None] * self.n + c).view(-1) for r, c in zip(rows, self._cells, strict=True)])
        self._flat_index_of[:] = [leading_shape, index]
        return index

    @cached_property
    def _flat_index_of(self) -> list:
        return []

    def mask(self, *leading_shape: int) -> Tensor:
        """Which entries of a batch are kept: bool ``[*leading_shape, n]``."""
        mask = torch.zeros(*leading_shape, self.n, dtype=torch.bool)
        mask.view(-1)[self.flat_index(tuple(leading_shape))] = True
        return mask


@lru_cache(maxsize=1024)
def _natural_cells(n: int, dp: int, block_size: int) -> tuple[Tensor, ...]:
    cell = (torch.arange(n) // block_size).remainder(dp)
    return tuple((cell == c).nonzero().squeeze(1) for c in range(dp))


@lru_cache(maxsize=256)
def _row_groups(leading_shape: tuple[int, ...], n_groups: int) -> tuple[Tensor, ...]:
    if n_groups == 1:
        return (torch.arange(math.prod(leading_shape)),)
    group = torch.zeros(leading_shape, dtype=torch.int64)
    for dim, size in enumerate(leading_shape):
        group += torch.arange(size).view(-1, *[1] * (len(leading_shape) - dim - 1))
    group = group.view(-1).remainder(n_groups)
    return tuple((group == g).nonzero().squeeze(1) for g in range(n_groups))
