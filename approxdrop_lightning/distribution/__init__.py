"""Search for the pattern distribution for a dropout rate: probabilities over ``(dp, keep)``.

A pattern that keeps ``keep`` of ``dp`` cells drops the share ``u = (dp - keep) / dp``. The search finds the
probabilities ``k`` of maximum entropy with ``sum_i k_i u_i = rate``, so that each unit is dropped with exactly that
rate (Song et al., DATE 2019, section 3.4).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Defaults of the callback.
MAX_DP, KEEP, CONCENTRATION = 10, "any", 1000.0

#: Above this concentration the distribution equals its limit in float64.
_STEADIEST = 1e6


@dataclass(frozen=True)
class PatternDistribution:
    """Probabilities over ``(dp, keep)`` whose expected dropped share is ``rate``.

    Attributes:
        support: Pairs ``(dp, keep)``.
        probabilities: One float per pair, summing to 1.
        rate: The requested dropout rate, in [0, 1).
    """

    support: tuple[tuple[int, int], ...]
    probabilities: tuple[float, ...]
    rate: float

    @classmethod
    def search(
        cls,
        rate: float,
        max_dp: int = 10,
        method: str = "maxent",
        keep: str = "one",
        concentration: float = 0.0,
    ) -> PatternDistribution:
        r"""Find the distribution of maximum entropy whose expected dropped share is ``rate``.

        The optimum is :math:`k_i \propto \exp(\beta u_i - \gamma (u_i - p)^2)` with the dropped shares
        :math:`u_i`, the rate :math:`p`, the concentration :math:`\gamma`, and :math:`\beta` chosen by
        bisection to meet the rate.

        Args:
            rate: Share of units dropped in expectation, in [0, 1).
            max_dp: Largest period (the paper's N), at least 1.
            method: ``"maxent"``, the closed form; ``"sgd"``, the paper's search (section 3.3): softmax
                parameters descend on ``lambda1 (sum k u - p)^2 + lambda2 sum k log k``.
            keep: ``"one"``: patterns keep 1 of ``dp`` cells, as in the paper. ``"any"``: they may keep several, so
                that there are patterns close to every rate, and low rates do not need steps that drop nothing.
            concentration: gamma, >= 0. 0 is the paper's optimum; ``inf`` puts all mass on the two dropped shares that
                bracket the rate.

        Raises:
            ValueError: An argument is out of range, or no ``dp <= max_dp`` drops enough.
        """
        _check(rate, max_dp, method, keep, concentration)
        support = _support(max_dp, keep)
        shares = [(dp - kept) / dp for dp, kept in support]
        if rate == 0:
            return cls(support, tuple(float(dp == 1) for dp, _ in support), 0.0)
        if method == "sgd":
            probabilities = _sgd(shares, rate, concentration)
        else:
            probabilities = _maxent(shares, rate, concentration)
        return cls(support, tuple(probabilities), float(rate))

    @property
    def entropy(self) -> float:
        """Entropy in nats."""
        return sum(-k * math.log(k) for k in self.probabilities if 0 < k < 1)

    @property
    def expected_rate(self) -> float:
        """Expected dropped share: ``rate`` up to the tolerance of the search."""
        return sum(k * (dp - kept) / dp for k, (dp, kept) in zip(self.probabilities, self.support, strict=True))

    @property
    def rate_std(self) -> float:
        """Standard deviation of the dropped share from step to step."""
        mean = self.expected_rate
        second = sum(
            k * ((dp - kept) / dp - mean) ** 2 for k, (dp, kept) in zip(self.probabilities, self.support, strict=True)
        )
        return math.sqrt(max(second, 0.0))

    @property
    def dense_share(self) -> float:
        """Expected share of steps that drop nothing."""
        return sum(k for k, (dp, kept) in zip(self.probabilities, self.support, strict=True) if dp == kept)


def check_rate(rate: float) -> float:
    """Return ``rate`` as a float; raise ``ValueError`` unless it is a number in [0, 1)."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"dropout rate must be a number in [0, 1), got {rate!r}")
    return float(rate)


def _check(rate: float, max_dp: int, method: str, keep: str, concentration: float) -> None:
    check_rate(rate)
    if isinstance(max_dp, bool) or not isinstance(max_dp, int) or max_dp < 1:
        raise ValueError(f"max_dp must be an integer >= 1, got {max_dp!r}")
    if method not in ("maxent", "sgd"):
        raise ValueError(f"search method must be 'maxent' or 'sgd', got {method!r}")
    if keep not in ("one", "any"):
        raise ValueError(f"keep must be 'one' or 'any', got {keep!r}")
    if isinstance(concentration, bool) or not isinstance(concentration, (int, float)) or not concentration >= 0:
        raise ValueError(f"concentration must be a number >= 0, got {concentration!r}")
    if rate > (max_dp - 1) / max_dp:
        # 1 - 1/dp >= rate; the ceiling needs a tolerance because 1 / (1 - 0.9) is 10.000000000000002.
        serves = max(2, math.ceil(1 / (1 - rate) - 1e-9))
        raise ValueError(
            f"dropout rate {rate} needs patterns that drop more than max_dp={max_dp} allows "
            f"(at most {(max_dp - 1) / max_dp:.4g}); the smallest max_dp that serves is {serves}"
        )


def _support(max_dp: int, keep: str) -> tuple[tuple[int, int], ...]:
    if keep == "one":
        return tuple((dp, 1) for dp in range(1, max_dp + 1))
    # Among pairs with equal shares, keep the one with the smallest period.
    return tuple(
        (dp, m)
        for dp in range(1, max_dp + 1)
        for m in range(1, dp + 1)
        if math.gcd(dp, m) == 1 and (m < dp or dp == 1)
    )


def _softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    total = sum(weights)
    return [w / total for w in weights]


def _bracket(shares: Sequence[float], rate: float) -> list[float]:
    """All mass on the nearest shares below and above the rate: the limit gamma -> inf."""
    below = max((u for u in shares if u <= rate), default=min(shares))
    above = min((u for u in shares if u >= rate), default=max(shares))
    upper = 0.0 if above == below else (rate - below) / (above - below)
    return [(1 - upper) if u == below else upper if u == above else 0.0 for u in shares]


def _maxent(shares: Sequence[float], rate: float, gamma: float) -> list[float]:
    """Closed form; the expected share rises with beta, so bisection cannot fail."""
    if gamma >= _STEADIEST or rate >= max(shares) - 1e-12:
        return _bracket(shares, rate)

    def at(beta: float) -> list[float]:
        return _softmax([beta * u - gamma * (u - rate) ** 2 for u in shares])

    def excess(beta: float) -> float:
        return sum(k * u for k, u in zip(at(beta), shares, strict=True)) - rate

    low, high = -1.0, 1.0
    while excess(low) > 0:
        low *= 2
    while excess(high) < 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return at((low + high) / 2)


def _sgd(shares: Sequence[float], rate: float, gamma: float, steps: int = 4_000) -> list[float]:
    """The paper's search. Warns if it does not reach the closed form's optimum."""
    u = torch.tensor(shares, dtype=torch.float64, device="cpu")
    logits = torch.zeros_like(u)
    target = torch.tensor(_maxent(shares, rate, gamma), dtype=torch.float64, device="cpu")
    target_entropy = float(torch.special.entr(target).sum())

    def errors() -> tuple[float, float]:
        k = logits.softmax(0)
        return abs(float(k @ u) - rate), abs(float(torch.special.entr(k).sum()) - target_entropy)

    # The rate's weight (lambda1 / lambda2) rises in stages: a large one from the start would overshoot and
    # saturate the softmax, a small one at the end would miss the rate.
    for rate_weight in (1e1, 1e2, 1e3, 1e4, 1e5):
        # The rate term's curvature in the logits is at most 2 lambda1 / 16.
        learning_rate = min(0.5, 4.0 / (rate_weight + gamma))
        velocity = torch.zeros_like(u)
        for step in range(steps):
            k = logits.softmax(0)
            slope = 2 * rate_weight * (k @ u - rate) * u + k.clamp_min(1e-300).log() + gamma * (u - rate) ** 2
            gradient = learning_rate * k * (slope - k @ slope)
            gradient = gradient * (0.02 / gradient.norm().clamp_min(0.02))  # clipped: far steps saturate the softmax
            velocity = 0.95 * velocity - gradient
            logits = logits + velocity
            if step % 100 == 99 and max(errors()) < 5e-4:
                return logits.softmax(0).tolist()
    rate_error, entropy_error = errors()
    if not (rate_error <= 1e-3 and entropy_error <= 1e-2):
        warnings.warn(
            f"search='sgd' did not converge for rate {rate}: it misses the rate by {rate_error:.2g} and the "
            f"optimal entropy by {entropy_error:.2g}; search='maxent' is exact",
            stacklevel=4,
        )
    return logits.softmax(0).tolist()
