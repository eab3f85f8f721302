"""Sampling of patterns from a distribution, with a private random generator."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import torch

from approxdrop_lightning.distribution import PatternDistribution
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.tile import BernoulliPattern, TilePattern


def fitting_block_size(n: int, dp: int, block_size: int) -> int:
    """Block size for ``n`` units and a period.

    This is ``block_size``, halved until each cell has at least four blocks; with fewer blocks, the sizes of the cells
    would differ too much. Halving keeps powers of two aligned with vectors.
    """
    while block_size > 1 and n < 4 * dp * block_size:
        block_size //= 2
    return block_size


def fitting_tile_size(n_out: int, n_in: int, dp: int, tile_size: int) -> int:
    """Tile size for a weight and a period.

    This is ``tile_size``, halved until both sides have ``4 * dp`` tiles or a tile is a single weight. Every row and
    every column then keeps some weights, and their numbers differ by at most a quarter. Halving keeps tiles aligned.
    """
    while tile_size > 1 and min(n_out, n_in) < 4 * dp * tile_size:
        tile_size //= 2
    return tile_size


#: Rows of a group from which on further orders cost little time.
_MANY_ROWS = 64


def fewest_rows(rate: float) -> int:
    """Fewest rows that several orders should leave a group: 8 at rate .5, 19 at .3, 4 at .7.

    With 8 rows at .5 and 4 at .7 the quality is that of conventional dropout (docs/results.md, Orders). The variance
    of a kept value, scaled, is ``rate / (1 - rate)`` times its square, so the number of masks is in proportion.
    """
    return math.ceil(8 * (1 - rate) / max(rate, 0.01) - 1e-9)


class PatternSampler:
    """Draws patterns. Holds the only random state of the package; the global generator is never used.

    Each step starts with :meth:`draw`, which picks ``(dp, keep)`` for all patterns of the step, so that the groups of
    interleaved patterns line up from layer to layer. Each call of :meth:`pattern` or :meth:`tiles` then draws its own
    offset and order.

    Args:
        distribution: Probabilities over ``(dp, keep)``.
        interleave: Whether the rows of a batch alternate between the cells of a pattern.
        shuffle: Whether each pattern permutes the units before dividing them into cells.
        block_size: Maximum number of units permuted as a block, >= 1; see :func:`fitting_block_size`. Ignored
            without ``shuffle``.
        seed: Seed of the private generator, any integer; reduced modulo 2**64.
        rank: Rank of this process. Processes with the same seed draw the same ``(dp, keep)`` at each step, so that
            none waits for another, but different patterns.
        orders: Maximum number of orders of the units that the rows of a batch alternate between, >= 1; None: 8 for
            sequences, 16 for samples (a single leading dimension), and up to 32 for these if groups of 64 rows
            remain, as measured (docs/results.md, Orders). See
            :meth:`pattern`. Ignored unless both ``interleave`` and ``shuffle`` are set.
        group_rows: Minimum number of rows per group with several orders, >= 1. It does not depend on the
            number of units: a product between two layers skips on both sides if both have the same groups.
        tile_size: Maximum tile size, >= 1; see :func:`fitting_tile_size`.
    """

    def __init__(
        self,
        distribution: PatternDistribution,
        interleave: bool = False,
        shuffle: bool = False,
        block_size: int = 1,
        seed: int = 0,
        rank: int = 0,
        tile_size: int = 32,
        orders: int | None = 1,
        group_rows: int = 8,
    ) -> None:
        self.distribution = distribution
        self.interleave = interleave
        self.shuffle = shuffle
        self.block_size = block_size
        self.tile_size = tile_size
        self.orders = orders
        self.group_rows = group_rows
        self.rank = rank
        # PyTorch takes 64-bit seeds and maps negative ones to the upper half of the range, as the remainder does.
        self._steps = torch.Generator("cpu").manual_seed(operator.index(seed) % 2**64)
        # Reseeded from `_steps` at each step, so that processes cannot drift apart and a step's patterns do not
        # depend on how many patterns earlier steps drew.
        self._patterns = torch.Generator("cpu")
        # Without pairs of probability zero, which rounding in the cumulative sum could otherwise select.
        pairs = [(s, k) for s, k in zip(distribution.support, distribution.probabilities, strict=True) if k > 0]
        self._support = [s for s, _ in pairs]
        self._cumulative = list(accumulate(k for _, k in pairs))
        self.dp, self.keep = self._support[0]
        #: The step's quantile in the distribution and the seed of its patterns, from which compiled graphs derive
        #: their own.
        self.quantile, self.seed_of_step = 0.0, 0
        self.draw()

    def draw(self) -> tuple[int, int]:
        """Start a step by drawing its ``(dp, keep)``."""
        self.quantile = torch.rand((), generator=self._steps, dtype=torch.float64, device="cpu").item()
        index = min(bisect_right(self._cumulative, self.quantile * self._cumulative[-1]), len(self._support) - 1)
        self.dp, self.keep = self._support[index]
        seed = int(torch.randint(2**31, (), generator=self._steps, device="cpu"))
        self.seed_of_step = (seed + 1_000_003 * self.rank) % 2**32
        self._patterns.manual_seed(self.seed_of_step)
        return self.dp, self.keep

    def pattern(
        self, n: int, shared: bool = False, leading_shape: tuple[int, ...] = (), group_rows: int = 1
    ) -> RowPattern:
        """Draw a pattern of ``n`` units with the step's ``(dp, keep)``; if ``shared``, the same for all rows.

        An interleaved pattern has as many orders of the units as possible such that each group has at least
        ``group_rows`` rows of the batch, between one and ``orders``; docs/results.md shows the benefit of several.
        ``group_rows`` is what the device asks for: a group then has that many rows if there are several orders.
        """
        interleave = self.interleave and not shared
        if self.keep == self.dp:
            return RowPattern(n, 1, 0)
        offset = int(torch.randint(self.dp, (), generator=self._patterns, device="cpu"))
        if not self.shuffle:
            return RowPattern.unchecked(n, self.dp, offset, self.keep, interleave, None, 1)
        block_size = fitting_block_size(n, self.dp, self.block_size)
        n_blocks = -(-n // block_size)
        order = torch.randperm(n_blocks, generator=self._patterns, device="cpu")
        pattern = RowPattern.unchecked(n, self.dp, offset, self.keep, interleave, order, block_size)
        least = max(group_rows, self.group_rows)
        orders = self.n_orders(pattern.n_groups, leading_shape, least) if interleave else 1
        if orders < 2:
            return pattern
        further = [torch.randperm(n_blocks, generator=self._patterns, device="cpu") for _ in range(orders - 1)]
        return pattern.reordered(torch.stack([order, *further]))

    def n_orders(self, n_groups: int, leading_shape: tuple[int, ...], least: int) -> int:
        """Number of orders of the units that the rows of a batch alternate between; see :meth:`pattern`.

        Args:
            n_groups: Number of groups in one order.
            leading_shape: Shape of the batch.
            least: Minimum number of rows per group.
        """
        rows = math.prod(leading_shape) if leading_shape else 0
        most = self.orders
        if most is None:
            most = 8 if len(leading_shape) != 1 else max(16, min(32, rows // (n_groups * _MANY_ROWS)))
        return max(1, min(most, rows // (n_groups * least)))

    def tiles(self, n_out: int, n_in: int) -> TilePattern:
        """Draw a pattern of a weight ``[n_out, n_in]`` with the step's ``(dp, keep)``."""
        if self.keep == self.dp:
            return TilePattern(n_out, n_in, 1, 0)
        offset = int(torch.randint(self.dp, (), generator=self._patterns, device="cpu"))
        tile_size = fitting_tile_size(n_out, n_in, self.dp, self.tile_size)
        return TilePattern(n_out, n_in, self.dp, offset, self.keep, tile_size)

    def bernoulli(self, n_out: int, n_in: int) -> BernoulliPattern:
        """Draw a mask of independent entries of a matrix ``[n_out, n_in]`` at the distribution's rate."""
        seed = int(torch.randint(2**31, (), generator=self._patterns, device="cpu"))
        return BernoulliPattern(n_out, n_in, self.distribution.rate, seed)

    def state_dict(self) -> dict[str, Any]:
        """State for continuing exactly the same sequence; loadable with ``weights_only=True``."""
        return {
            "steps": self._steps.get_state(),
            "patterns": self._patterns.get_state(),
            "dp": self.dp,
            "keep": self.keep,
            "quantile": self.quantile,
            "seed": self.seed_of_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the sequence from a :meth:`state_dict`.

        Raises:
            ValueError: The state's ``(dp, keep)`` cannot come from this sampler's distribution.
        """
        pair = (state["dp"], state["keep"])
        if pair not in self._support:
            raise ValueError(
                f"the saved pattern state (dp, keep) = {pair} cannot come from this distribution, "
                f"whose support is {self._support}: rate, max_dp or keep were changed"
            )
        self._steps.set_state(state["steps"].cpu())
        self._patterns.set_state(state["patterns"].cpu())
        self.dp, self.keep = pair
        # Of the current step. States of older versions lack them; compiled patterns then start with the next step.
        self.quantile = float(state.get("quantile", self.quantile))
        self.seed_of_step = int(state.get("seed", self.seed_of_step))
