"""Pairs of a compiled run: few, and of the rate exactly."""

import pytest

from approxdrop_lightning.distribution import PatternDistribution
from approxdrop_lightning.graph.pairs import LEAST, MOST, Pairs

RATES = (0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.35, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.89, 0.9)
SETTINGS = {
    "default": {"keep": "any", "concentration": 1000.0},
    "steadiest": {"keep": "any", "concentration": float("inf")},
    "paper": {"keep": "one", "concentration": 0.0},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rate", RATES)
def test_few_pairs_meet_the_rate(rate, setting):
    pairs = Pairs(PatternDistribution.search(rate, **SETTINGS[setting]))
    assert 1 <= len(pairs.support) <= MOST
    assert pairs.expected_rate == pytest.approx(rate, abs=1e-9)
    assert sum(pairs.probabilities) == pytest.approx(1)


def test_what_is_left_out_is_rare():
    """At .5 nine batches of ten have (2, 1); 28 pairs of less than 1% are gone, hence 28 graphs."""
    found = PatternDistribution.search(0.5, **SETTINGS["default"])
    pairs = Pairs(found)
    assert sum(k > 0 for k in found.probabilities) == 31 + 1
    assert set(pairs.support) == {p for p, k in zip(found.support, found.probabilities, strict=True) if k >= LEAST}
    assert dict(zip(pairs.support, pairs.probabilities, strict=True))[2, 1] > 0.9


def test_quantiles_have_the_pairs_probabilities():
    pairs = Pairs(PatternDistribution.search(0.3, **SETTINGS["default"]))
    drawn = [pairs.at((i + 0.5) / 10_000) for i in range(10_000)]
    for pair, k in zip(pairs.support, pairs.probabilities, strict=True):
        assert drawn.count(pair) / 10_000 == pytest.approx(k, abs=2e-4)


def test_rates_draw_together():
    """From one quantile, so that pairs of several rates do not multiply."""
    first, second = (Pairs(PatternDistribution.search(rate, **SETTINGS["default"])) for rate in (0.3, 0.7))
    both = {(first.at(i / 1000), second.at(i / 1000)) for i in range(1000)}
    assert len(both) < len(first.support) + len(second.support)
