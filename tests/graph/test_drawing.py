import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from approxdrop_lightning.distribution import PatternDistribution
from approxdrop_lightning.graph.drawing import Draw
from approxdrop_lightning.graph.layout import TableUse, layout_of
from approxdrop_lightning.patterns.sampler import PatternSampler

PAIRS = [(2, 1), (3, 1), (10, 3), (10, 7), (5, 4)]


def sampler(shuffle: bool, seed: int = 0) -> PatternSampler:
    return PatternSampler(PatternDistribution.search(0.5), shuffle=shuffle, seed=seed)


def uses(n: int, pair: tuple[int, int], shuffle: bool, orders: int, count: int) -> list[TableUse]:
    layout = layout_of(n, *pair, shuffle=shuffle, orders=orders)
    return [TableUse(1 + i * (layout.size + 3), 1.0, *layout) for i in range(count)]


@given(
    st.integers(1, 300),
    st.sampled_from(PAIRS),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_uses_drawn_together_have_the_patterns_they_have_alone(n, pair, shuffle, orders, count, seed):
    drawn, given_uses = sampler(shuffle, seed), uses(n, pair, shuffle, orders, count)
    size = given_uses[-1].at + given_uses[-1].layout.size + 2
    together, alone = np.full(size, -1), np.full(size, -1)
    keys = [("a use", i) for i in range(count)]
    Draw(drawn, pair, given_uses, keys).write(together)
    for use, key in zip(given_uses, keys, strict=True):
        Draw(drawn, pair, [use], [key]).write(alone)
    assert (together == alone).all()
    for use in given_uses:
        layout, table = use.layout, torch.from_numpy(together)
        place, block_at = use.place(table), use.block_at(table)
        assert (block_at.gather(1, place) == torch.arange(layout.blocks)).all()  # inverse permutations
        assert layout.kept - layout.spare <= int(use.active(table)) <= layout.kept
    assert together[0] == -1 and together[-1] == -1  # nothing beside its part
    gaps = [use.at + use.layout.size + i for use in given_uses[:-1] for i in range(3)]
    assert (together[gaps] == -1).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_uses_and_steps_differ_and_each_unit_is_kept_at_the_rate(pair):
    """Over 4,000 steps each block of a use is kept with ``keep / dp``: within 5 standard deviations, 2e-4 in all."""
    dp, keep = pair
    drawn, both = sampler(True), uses(16 * 22, pair, True, 1, 2)
    draw, table = Draw(drawn, pair, both, ["first", "second"]), np.zeros(2 * both[0].layout.size + 8, dtype=np.int64)
    steps, kept, equal = 4000, np.zeros((2, both[0].layout.blocks)), 0
    for _ in range(steps):
        drawn.draw()
        draw.write(table)
        masks = [use.keeps(torch.from_numpy(table))[0].numpy() for use in both]
        equal += (masks[0] == masks[1]).all()
        kept += masks
    share = keep / dp
    assert equal < steps / 10
    assert np.abs(kept / steps - share).max() < 5 * (share * (1 - share) / steps) ** 0.5
