"""Units by cell: what the kept units of a row pattern are selected from, in Python and in compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from approxdrop_lightning.patterns.units import Units

#: Cell of each block of units, counted from the first kept one: int64 ``[orders, blocks]``.
CellOfBlock = np.ndarray[Any, np.dtype[np.int64]]


class PatternStruct(ctypes.Structure):
    """``Pattern`` of ``grouped.c``, which sorts blocks by cell itself."""

    _fields_ = [
        ("n", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("cells", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("keep", ctypes.c_int64),
        ("shift", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("orders", ctypes.c_int64),
        ("ascending", ctypes.c_int64),
        ("order", ctypes.c_void_p),
    ]


@dataclass(frozen=True, eq=False)
class Cells:
    """Blocks of units sorted by cell, starting with the first kept one, so that consecutive cells form a slice.

    Attributes:
        starts: First unit of each block, int64, for each order.
        lengths: Units of each block, int64, for each order.
        first_block: Number of blocks before each cell, and of all; the same for every order.
        first_unit: Number of units before each cell, and of all, for each order.
    """

    starts: Sequence[Tensor]
    lengths: Sequence[Tensor]
    first_block: list[int]
    first_unit: list[list[int]]

    def between(self, order: int, first: int, last: int) -> Units:
        """The units in the cells from ``first`` up to ``last`` of an order, cell by cell."""
        here, units = slice(self.first_block[first], self.first_block[last]), self.first_unit[order]
        return Units(self.starts[order][here], self.lengths[order][here], units[last] - units[first])


def sort_by_cell(n: int, cells: CellOfBlock, dp: int, block_size: int) -> Cells:
    """Sort blocks of units by cell.

    Args:
        n: Number of units.
        cells: Cell of each block, in [0, dp).
        dp: Number of cells.
        block_size: Units per block. The last block may be shorter.
    """
    # In NumPy, because PyTorch calls on such small tensors take several times as long.
    orders, n_blocks = cells.shape
    blocks = cells.argsort(axis=1, kind="stable")
    first_block = [0, *np.bincount(cells[0], minlength=dp).cumsum().tolist()]
    units = [block * block_size for block in first_block]
    lengths, first_unit = [_lengths(n_blocks, block_size)] * orders, [units] * orders
    if missing := n_blocks * block_size - n:
        last = cells[:, -1].tolist()
        lengths = [torch.where(torch.from_numpy(b == n_blocks - 1), block_size - missing, block_size) for b in blocks]
        first_unit = [[u - missing * (cell > last[o]) for cell, u in enumerate(units)] for o in range(orders)]
    return Cells(torch.from_numpy(blocks * block_size).unbind(), lengths, first_block, first_unit)


@lru_cache(maxsize=1024)
def _lengths(n_blocks: int, block_size: int) -> Tensor:
    """Lengths of blocks of equal size."""
    return torch.full((n_blocks,), block_size, device="cpu")


@lru_cache(maxsize=4096)
def kept_counts(n_blocks: int, dp: int, offset: int, keep: int, shift: int, groups: int) -> list[int]:
    """Number of blocks that each group of one order keeps, if positions are dealt out to the cells in turn."""
    least, more = divmod(n_blocks, dp)
    in_cell = [least + ((c + offset) % dp < more) for c in range(dp)]
    return [sum(in_cell[g * shift : g * shift + keep]) for g in range(groups)]


@lru_cache(maxsize=1024)
def natural_cells(n: int, dp: int, offset: int, block_size: int) -> Cells:
    """Units in natural order, by cell: unit ``j`` lies in cell ``(j // block_size - offset) mod dp``."""
    cells = (np.arange(-(-n // block_size))[None] - offset) % dp
    return sort_by_cell(n, cells, dp, block_size)
