"""Patterns of weights: the entries of a weight matrix that are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from approxdrop_lightning.distribution import check_rate
from approxdrop_lightning.patterns.cells import natural_cells
from approxdrop_lightning.patterns.row import HOST, check_integers
from approxdrop_lightning.patterns.units import Units


@dataclass(frozen=True)
class TilePattern:
    """Tile-based dropout pattern of a weight ``[n_out, n_in]`` (Song et al., DATE 2019, section 3.2).

    The weight is cut into square tiles; those in the last row and column of tiles may be smaller. Tile ``(i, j)`` is
    kept iff ``(i + j - offset) mod dp < keep``: the kept tiles lie on diagonals, so every row and every column of
    tiles loses the same share, up to one tile. Because ``offset`` is uniform over ``dp`` values, every weight is kept
    with probability exactly ``keep / dp``, whatever the sizes.

    Rows of tiles that are congruent modulo ``dp`` keep the same columns of tiles, so the kept weights form at most
    ``dp`` dense submatrices; see :meth:`submatrices`.

    Attributes:
        n_out: Rows of the weight, >= 1.
        n_in: Columns of the weight, >= 1.
        dp: Period, >= 1.
        offset: Diagonal of the first kept tiles, in [0, dp).
        keep: Number of kept diagonals of ``dp``, in [1, dp].
        tile_size: Rows and columns of a tile, >= 1.

    Raises:
        ValueError: An argument is out of range.
    """

    n_out: int
    n_in: int
    dp: int
    offset: int
    keep: int = 1
    tile_size: int = 32

    def __post_init__(self) -> None:
        check_integers(self, n_out=1, n_in=1, dp=1, tile_size=1)
        check_integers(self, offset=(0, self.dp - 1), keep=(1, self.dp))

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped."""
        return self.keep == self.dp

    @property
    def t(self) -> TilePattern:
        """Pattern of the transposed weight, which has the same diagonals."""
        return TilePattern(self.n_in, self.n_out, self.dp, self.offset, self.keep, self.tile_size)

    @property
    def dropped(self) -> TilePattern:
        """Pattern that keeps exactly the tiles that this one drops; there must be some."""
        offset = (self.offset + self.keep) % self.dp
        return TilePattern(self.n_out, self.n_in, self.dp, offset, self.dp - self.keep, self.tile_size)

    def submatrices(self) -> tuple[tuple[Units, Units], ...]:
        """The kept weights as dense submatrices, given by ``(rows, columns)``.

        Every row is in exactly one submatrix, which has no columns if its rows are dropped entirely. In the
        transposed pattern, every column is in exactly one submatrix instead.
        """
        return _submatrices(self)

    @property
    def n_kept(self) -> int:
        """Number of weights kept."""
        return sum(rows.count * columns.count for rows, columns in self.submatrices())

    @property
    def share(self) -> float:
        """Share of the weights kept."""
        return self.n_kept / (self.n_out * self.n_in)

    def mask(self, device: torch.device = HOST) -> Tensor:
        """Mask of the kept weights: bool ``[n_out, n_in]`` on ``device``."""
        size = self.tile_size
        i, j = (torch.arange(-(-n // size), device=device) for n in (self.n_out, self.n_in))
        tiles = (i[:, None] + j - self.offset).remainder(self.dp) < self.keep
        n_rows, n_columns = tiles.shape
        tiles = tiles[:, None, :, None].expand(n_rows, size, n_columns, size)
        return tiles.reshape(n_rows * size, n_columns * size)[: self.n_out, : self.n_in]


@dataclass(frozen=True)
class BernoulliPattern:
    """Independently kept entries of a matrix ``[n_out, n_in]``, as in DropConnect (Wan et al., 2013).

    There is no structure, so nothing can be skipped.

    Attributes:
        n_out: Rows of the matrix, >= 1.
        n_in: Columns of the matrix, >= 1.
        rate: Probability that an entry is dropped, in [0, 1).
        seed: Seed of the mask, >= 0.

    Raises:
        ValueError: An argument is out of range.
    """

    n_out: int
    n_in: int
    rate: float
    seed: int

    def __post_init__(self) -> None:
        check_integers(self, n_out=1, n_in=1, seed=0)
        check_rate(self.rate)

    @property
    def share(self) -> float:
        """Expected share of the entries kept."""
        return 1 - self.rate

    def mask(self, device: torch.device = HOST) -> Tensor:
        """Mask of the kept entries: bool ``[n_out, n_in]``, the same in every call for a given type of device."""
        generator = torch.Generator(device).manual_seed(self.seed)
        mask = torch.empty(self.n_out, self.n_in, dtype=torch.bool, device=generator.device)
        return mask.bernoulli_(self.share, generator=generator)


@lru_cache(maxsize=1024)
def _submatrices(pattern: TilePattern) -> tuple[tuple[Units, Units], ...]:
    if pattern.keeps_all:
        return ((Units.every(pattern.n_out), Units.every(pattern.n_in)),)
    dp, size = pattern.dp, pattern.tile_size
    by_row = natural_cells(pattern.n_out, dp, 0, size)
    found = []
    for i in range(dp):
        rows = by_row.between(0, i, i + 1)
        if rows.count:
            columns = natural_cells(pattern.n_in, dp, (pattern.offset - i) % dp, size).between(0, 0, pattern.keep)
            starts, order = columns.starts.sort()
            found.append((rows, Units(starts, columns.lengths[order], columns.count)))
    return tuple(found)
