"""Drawing of patterns into a table, on the host.

Uses of dropouts that have their layout in common are drawn together, so that a step takes little longer for many
dropouts than for one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from approxdrop_lightning.graph.layout import Layout, TableUse, share_of_spare
from approxdrop_lightning.graph.pairs import Pair
from approxdrop_lightning.patterns.sampler import PatternSampler

Array = np.ndarray[Any, Any]


class Draw:
    """Draws the patterns of uses that have a sampler, a pair and a layout in common.

    Args:
        sampler: Its seed of the step determines the patterns.
        pair: ``(dp, keep)``.
        uses: The uses.
        keys: One for each use: uses with different keys have different patterns, whatever else is drawn with them.
    """

    def __init__(self, sampler: PatternSampler, pair: Pair, uses: Sequence[TableUse], keys: Sequence[object]) -> None:
        self._sampler, self._layout = sampler, uses[0].layout
        s, (dp, keep) = self._layout, pair
        # Constants from which each step draws a random number for each place, and one for the spare.
        self._lanes = np.stack([_lanes(key, s) for key in keys])
        firsts = np.array([use.at for use in uses])
        self._rows = (firsts[:, None] + np.arange(0, s.orders * s.blocks, s.blocks)).reshape(-1, 1)
        self._blocks = np.arange(s.blocks)
        self._segments = s.segments
        self._by_cell = (self._blocks % dp).argsort(kind="stable")
        n = s.orders * s.blocks
        self._after = [slice(use.at + n, use.at + 2 * n) for use in uses]
        self._ends = firsts + s.size - 1
        self._share_of_spare = share_of_spare(s, dp, keep)

    def write(self, table: Array) -> None:
        """Write the patterns of this step."""
        s = self._layout
        random = _mixed(self._lanes ^ np.uint64(self._sampler.seed_of_step * 0x9E3779B97F4A7C15 % 2**64))
        if self._sampler.shuffle:
            block_at = random[:, :-1].reshape(-1, s.blocks).argsort(1)
            for segment in self._segments:  # the masks stay the same, and products read ascending units faster
                block_at[:, segment].sort(1)
        else:  # in natural order, cell by cell, from a random unit on
            block_at = (self._by_cell + (random[:, :1] % np.uint64(s.blocks)).astype(np.int64)) % s.blocks
        table[self._rows + block_at] = self._blocks
        for here, values in zip(self._after, block_at.reshape(len(self._after), -1), strict=True):
            table[here] = values
        table[self._ends] = s.kept
        if s.spare:
            table[self._ends] -= random[:, -1] / 2.0**64 >= self._share_of_spare


def _lanes(key: object, layout: Layout) -> Array:
    first = zlib.crc32(repr(key).encode())
    return _mixed(np.arange(layout.orders * layout.blocks + 1, dtype=np.uint64) + (np.uint64(first) << np.uint64(32)))


def _mixed(x: Array) -> Array:
    """The finalizer of SplitMix64 (Steele et al., 2014), elementwise."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    shifted = x >> np.uint64(30)
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x
