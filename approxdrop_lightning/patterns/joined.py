"""Patterns of concatenated units: the result of ``torch.cat`` on units that each have a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor

from approxdrop_lightning.patterns.cells import Cells, sort_by_cell
from approxdrop_lightning.patterns.row import HOST, RowPattern


@dataclass(frozen=True, eq=False)
class JoinedPattern(RowPattern):
    """Pattern of the concatenated units of several patterns. Created by :func:`join`.

    Its ``order`` holds the cell of each block, counted from the first kept one, rather than a position: the blocks of
    a single piece are distributed evenly over the cells, but those of all pieces together need not be.

    Attributes:
        pieces: The patterns of the pieces.
    """

    pieces: tuple[RowPattern, ...] = ()
    _in_turn: ClassVar[bool] = False

    @cached_property
    def _cells(self) -> Cells:
        return sort_by_cell(self.n, self._orders.numpy(), self.dp, self.block_size)

    @property
    def share(self) -> float:
        """Share of the units kept, averaged over the groups."""
        return sum(piece.share * piece.n for piece in self.pieces) / self.n

    def mask(
        self,
        *leading_shape: int,
        dtype: torch.dtype = torch.bool,
        value: float = 1,
        device: torch.device = HOST,
    ) -> Tensor:
        """``[*leading_shape, n]``: ``value`` where an entry of the batch is kept, zero elsewhere."""
        masks = [piece.mask(*leading_shape, dtype=dtype, value=value, device=device) for piece in self.pieces]
        return torch.cat(masks, dim=-1)


def join(patterns: Sequence[RowPattern]) -> JoinedPattern | None:
    """The pattern of concatenated units, or None if the patterns assign the rows of a batch to different groups.

    Args:
        patterns: Patterns of the pieces, in order; at least one.

    Returns:
        A pattern of ``sum(p.n for p in patterns)`` units.
    """
    pieces = [piece for p in patterns for piece in (p.pieces if isinstance(p, JoinedPattern) else (p,))]
    first = pieces[0]
    kind = (first.dp, first.keep, first.interleave, first.n_orders)
    if any((p.dp, p.keep, p.interleave, p.n_orders) != kind or p.keeps_all for p in pieces):
        return None
    return _of(pieces)


def _of(pieces: Sequence[RowPattern]) -> JoinedPattern:
    first = pieces[0]
    # A common block size, such that no block extends across two pieces.
    block_size = gcd(*(p.block_size for p in pieces), *(p.n for p in pieces[:-1]))
    cells = torch.cat([_cells(p, block_size) for p in pieces], dim=1)
    pattern = JoinedPattern.unchecked(
        n=sum(p.n for p in pieces),
        dp=first.dp,
        offset=0,
        keep=first.keep,
        interleave=first.interleave,
        order=cells if len(cells) > 1 else cells[0],
        block_size=block_size,
    )
    assert isinstance(pattern, JoinedPattern)
    vars(pattern)["pieces"] = tuple(pieces)
    return pattern


def _cells(pattern: RowPattern, block_size: int) -> Tensor:
    """Cell of each block of the given size, ``[n_orders, blocks]``, counted from the first kept cell of group 0."""
    cells = (pattern._orders - pattern.offset).remainder(pattern.dp)
    blocks = -(-pattern.n // block_size)
    return cells.repeat_interleave(pattern.block_size // block_size, dim=1)[:, :blocks]
