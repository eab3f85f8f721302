"""Units by cell: what the kept units of a row pattern are selected from, in Python and in compiled code."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from approxdrop_lightning.patterns.units import Units

#: Cell of each block of units, counted from the first kept one: int64 ``[orders, blocks]``.
CellOfBlock = np.ndarray[Any, np.dtype[np.int64]]


class PatternStruct(ctypes.Structure):
    """``Pattern`` of ``grouped.c``."""

    _fields_ = [
        ("blocks", ctypes.c_int64),
        ("cells", ctypes.c_int64),
        ("keep", ctypes.c_int64),
        ("shift", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("orders", ctypes.c_int64),
        ("ragged", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("first_block", ctypes.c_void_p),
        ("first_unit", ctypes.c_void_p),
        ("ascending", ctypes.c_void_p),
    ]


@dataclass(frozen=True, eq=False)
class Bounds:
    """Where cells begin among the blocks and units that are sorted by cell.

    Attributes:
        blocks: Number of blocks before each cell, and of all.
        units: Number of units before each cell, and of all; one list per order if they differ.
        first_block: The former as int64 ``[cells + 1]``.
        first_unit: The latter as int64 ``[orders, cells + 1]``, with a single row if all orders agree.
    """

    blocks: list[int]
    units: list[list[int]]
    first_block: Tensor
    first_unit: Tensor

    @staticmethod
    def of(counts: list[int], block_size: int, short: list[int] | None = None, missing: int = 0) -> Bounds:
        """The bounds of cells that have so many blocks.

        Args:
            counts: Number of blocks in each cell.
            block_size: Units per block.
            short: Cell of the last block in each order, if that is shorter.
            missing: By how many units it is.
        """
        blocks = [0, *accumulate(counts)]
        even = [block * block_size for block in blocks]
        units = [even] if short is None else [[u - missing * (c > s) for c, u in enumerate(even)] for s in short]
        return Bounds(blocks, units, torch.tensor(blocks, device="cpu"), torch.tensor(units, device="cpu"))


@dataclass(frozen=True, eq=False)
class Cells:
    """Blocks of units sorted by cell, starting with the first kept one, so that consecutive cells form a slice.

    Attributes:
        starts: First unit of each block, int64 ``[orders, blocks]``.
        lengths: Units of each block, int64 ``[orders, blocks]``; with a single row if all are equally long.
        bounds: Where the cells begin.
    """

    starts: Tensor
    lengths: Tensor
    bounds: Bounds

    @property
    def is_ragged(self) -> bool:
        """Whether the last block is shorter, so that each order has lengths and bounds of its own."""
        return len(self.bounds.units) == len(self.starts) > 1

    def between(self, order: int, first: int, last: int) -> Units:
        """The units in the cells from ``first`` up to ``last`` of an order, cell by cell."""
        own = order if self.is_ragged else 0
        blocks, units = self.bounds.blocks, self.bounds.units[own]
        here = slice(blocks[first], blocks[last])
        return Units(self.starts[order, here], self.lengths[own, here], units[last] - units[first])


def sort_by_cell(n: int, cells: CellOfBlock, counts: Bounds, block_size: int) -> Cells:
    """Sort blocks of units by cell.

    Args:
        n: Number of units.
        cells: Cell of each block.
        counts: Bounds of the cells as they are if all blocks are equally long.
        block_size: Units per block. The last block may be shorter.
    """
    # In NumPy, because PyTorch calls on such small tensors take several times as long.
    orders, n_blocks = cells.shape
    blocks = cells.argsort(axis=1, kind="stable")
    lengths, missing = _lengths(n_blocks, block_size), n_blocks * block_size - n
    if missing:
        lengths = lengths.repeat(orders, 1)
        lengths[torch.from_numpy(blocks == n_blocks - 1)] = block_size - missing
        before = counts.blocks
        in_cell = [after - first for first, after in pairwise(before)]
        counts = Bounds.of(in_cell, block_size, cells[:, -1].tolist(), missing)
    blocks *= block_size
    return Cells(torch.from_numpy(blocks), lengths, counts)


@lru_cache(maxsize=1024)
def even_bounds(n_blocks: int, dp: int, offset: int, block_size: int) -> Bounds:
    """Bounds of cells among which the positions of an order are dealt out in turn."""
    least, more = divmod(n_blocks, dp)
    return Bounds.of([least + ((c + offset) % dp < more) for c in range(dp)], block_size)


@lru_cache(maxsize=1024)
def natural_cells(n: int, dp: int, offset: int, block_size: int) -> Cells:
    """Units in natural order, by cell: unit ``j`` lies in cell ``(j // block_size - offset) mod dp``."""
    n_blocks = -(-n // block_size)
    cells = (np.arange(n_blocks)[None] - offset) % dp
    return sort_by_cell(n, cells, even_bounds(n_blocks, dp, offset, block_size), block_size)


@lru_cache(maxsize=1024)
def _lengths(n_blocks: int, block_size: int) -> Tensor:
    """Lengths of blocks of equal size, in one row."""
    return torch.full((1, n_blocks), block_size, device="cpu")
