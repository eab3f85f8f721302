"""The pairs ``(dp, keep)`` of compiled graphs: few, because each one needs a graph."""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate

from approxdrop_lightning.distribution import PatternDistribution

#: Most pairs, hence graphs, for one rate; smallest probability of a pair.
MOST, LEAST = 4, 0.01

Pair = tuple[int, int]


class Pairs:
    """The most probable pairs of a distribution, reweighted to meet its rate exactly.

    Args:
        distribution: The distribution of eager mode.
        most: Maximum number of pairs.
    """

    def __init__(self, distribution: PatternDistribution, most: int = MOST) -> None:
        rate = distribution.rate
        drawn = sorted(
            ((k, pair) for pair, k in zip(distribution.support, distribution.probabilities, strict=True) if k > 0),
            reverse=True,
        )
        chosen = [pair for k, pair in drawn[:most] if k >= LEAST] or [drawn[0][1]]
        if _dropped(chosen[0]) != rate or len(chosen) > 1:
            # The rates of the pairs must enclose the rate; the nearest pair beyond replaces the least probable one.
            for sign in (-1, 1):
                beyond = [pair for pair in distribution.support if sign * (_dropped(pair) - rate) >= 0]
                if not set(beyond) & set(chosen):
                    chosen = [*chosen[: most - 1], min(beyond, key=lambda pair: abs(_dropped(pair) - rate))]
        self.support = tuple(sorted(chosen, key=_dropped))
        known = dict(zip(distribution.support, distribution.probabilities, strict=True))
        self.probabilities = _tilted([_dropped(p) for p in self.support], [known[p] for p in self.support], rate)
        self._cumulative = list(accumulate(self.probabilities))

    def at(self, u: float) -> Pair:
        """The pair at a quantile ``u`` in [0, 1)."""
        return self.support[min(bisect_right(self._cumulative, u * self._cumulative[-1]), len(self.support) - 1)]

    @property
    def expected_rate(self) -> float:
        """Expected dropout rate."""
        return sum(k * _dropped(pair) for k, pair in zip(self.probabilities, self.support, strict=True))


def _dropped(pair: Pair) -> float:
    return (pair[0] - pair[1]) / pair[0]


def exact_pair(rate: float, max_dp: int, keep: str) -> Pair | None:
    """The pair of smallest period that drops exactly ``rate``, in (0, 1), of the units; None if there is none.

    Args:
        rate: The rate.
        max_dp: Largest period.
        keep: ``"one"`` cell of the period or ``"any"`` number of cells is kept.
    """
    for dp in range(2, max_dp + 1):
        pair = dp, 1 if keep == "one" else round(dp * (1 - rate))
        if abs(_dropped(pair) - rate) < 1e-9:
            return pair
    return None


def _tilted(shares: list[float], weights: list[float], rate: float) -> tuple[float, ...]:
    """``k_i`` proportional to ``weights_i * exp(beta * shares_i)`` with mean ``rate``: closest in KL divergence."""
    if len(shares) == 1:
        return (1.0,)
    logs = [math.log(max(w, 1e-12)) for w in weights]

    def at(beta: float) -> list[float]:
        exponents = [log + beta * u for log, u in zip(logs, shares, strict=True)]
        top = max(exponents)
        values = [math.exp(e - top) for e in exponents]
        return [v / sum(values) for v in values]

    low, high = -1e4, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        mean = sum(k * u for k, u in zip(at(middle), shares, strict=True))
        low, high = (middle, high) if mean < rate else (low, middle)
    return tuple(at((low + high) / 2))
