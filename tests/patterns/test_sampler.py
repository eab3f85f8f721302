"""The sampler: correct frequencies, private randomness, exact resume."""

import io

import pytest
import torch
from torch import nn

from approxdrop_lightning import PatternDistribution, PatternSampler, approximate, resample
from approxdrop_lightning.patterns.sampler import fitting_block_size, fitting_tile_size

# Quantile of the chi-square distribution, 9 degrees of freedom, at 1 - 1e-4: each test below fails by chance once in
# 10,000 seeds, and the seeds are fixed.
CHI_SQUARE_9 = 33.72


def make(rate=0.6, seed=0, keep="one", gamma=0.0, **options):
    return PatternSampler(PatternDistribution.search(rate, 10, keep=keep, concentration=gamma), seed=seed, **options)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 + 7, 2**63 - 1, 2**63, 2**64 - 1, -1, -5, -(2**63)])
def test_a_seed_that_pytorch_takes_is_that_of_pytorch(seed):
    """Sequences are the same as in earlier versions."""
    expected = torch.Generator().manual_seed(seed)
    torch.rand((), generator=expected, dtype=torch.float64), torch.randint(2**31, (), generator=expected)
    assert torch.equal(make(seed=seed).state_dict()["steps"], expected.get_state())


@pytest.mark.parametrize("seed", [2**64, 2**64 + 5, -(2**63) - 1, 10**30, -(10**30)])
def test_any_other_integer_is_a_seed_too(seed):
    sampler = make(seed=seed)
    assert torch.equal(sampler.state_dict()["steps"], make(seed=seed % 2**64).state_dict()["steps"])
    with pytest.raises(TypeError):
        make(seed=0.5)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1])
def test_several_rates_at_the_last_seed(seed):
    """Each rate has its own sampler, with the next seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.3), nn.Linear(64, 8))
    report = approximate(model, min_gain=0)
    resample(model)
    model(torch.randn(4, 8)).sum().backward()
    assert report.saved > 0
    first, second = (site.sampler.state_dict()["steps"] for site in report.sites)
    assert not torch.equal(first, second)


def test_periods_are_drawn_as_distributed():
    sampler, draws = make(), 20_000
    counts = dict.fromkeys(sampler.distribution.support, 0)
    for _ in range(draws):
        counts[sampler.draw()] += 1
    expected = [k * draws for k in sampler.distribution.probabilities]
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts.values(), expected, strict=True))
    assert statistic < CHI_SQUARE_9


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("keep", ["one", "any"])
def test_every_unit_is_dropped_at_the_rate(shuffle, interleave, keep):
    """n = 13 is divided by no period > 1. Draws are independent, so each unit's count is binomial."""
    n, draws, rate = 13, 4000, 0.6
    sampler = make(rate, seed=1, keep=keep, shuffle=shuffle, interleave=interleave, block_size=2)
    dropped = torch.zeros(n)
    for _ in range(draws):
        sampler.draw()
        dropped += ~sampler.pattern(n).mask(1)[0]
    # 13 normal deviates, dependent: Bonferroni at 1e-4 / 13 is 4.6 sd.
    z = (dropped / draws - rate) / (rate * (1 - rate) / draws) ** 0.5
    assert z.abs().max() < 4.6


def test_offsets_are_uniform_given_the_period():
    sampler = make(0.75, gamma=float("inf"), seed=2)  # dp = 4 always
    counts = torch.zeros(4)
    for _ in range(8000):
        sampler.draw()
        counts[sampler.pattern(8).offset] += 1
    assert ((counts - 2000) ** 2 / 2000).sum() < 21.11  # chi-square, 3 degrees of freedom, 1 - 1e-4


def test_patterns_of_one_step_share_the_period_but_not_the_offset():
    sampler = make(0.7, shuffle=True, interleave=True, block_size=4)
    steps = [[sampler.draw(), sampler.pattern(64), sampler.pattern(64)] for _ in range(50)]
    for (dp, keep), a, b in steps:
        assert (a.dp, a.keep) == (b.dp, b.keep) == (dp, keep)
    assert any(a.offset != b.offset for _, a, b in steps)
    assert any(not torch.equal(a.order, b.order) for _, a, b in steps if a.order is not None)


def test_state_resumes_the_very_same_sequence_even_within_a_step():
    sampler = make(shuffle=True, interleave=True, seed=5)

    def sequence(steps):
        out = [sampler.pattern(33)]  # of the current step
        for _ in range(steps):
            sampler.draw()
            out += [sampler.pattern(n) for n in (7, 33)]
        return out

    sequence(3)
    buffer = io.BytesIO()
    torch.save(sampler.state_dict(), buffer)
    expected = sequence(40)
    other = make(shuffle=True, interleave=True, seed=99)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    sampler = other
    assert sequence(40) == expected


@pytest.mark.parametrize("keep", ["one", "any"])
def test_every_weight_is_dropped_at_the_rate(keep):
    """Steps draw independently, so each weight's count is binomial; tiles of one weight, as sizes are small."""
    shape, draws, rate = (5, 7), 4000, 0.6
    tiles, ones = torch.zeros(shape), torch.zeros(shape)
    sampler = make(rate, seed=4, keep=keep)
    for _ in range(draws):
        sampler.draw()
        tiles += ~sampler.tiles(*shape).mask()
        ones += ~sampler.bernoulli(*shape).mask()
    for dropped in (tiles, ones):
        # 35 normal deviates, dependent: Bonferroni at 1e-4 / 35 is 4.8 sd.
        z = (dropped / draws - rate) / (rate * (1 - rate) / draws) ** 0.5
        assert z.abs().max() < 4.8


def test_offsets_of_tiles_are_uniform_given_the_period():
    sampler = make(0.75, gamma=float("inf"), seed=5)  # dp = 4 always
    counts = torch.zeros(4)
    for _ in range(8000):
        sampler.draw()
        counts[sampler.tiles(64, 64).offset] += 1
    assert ((counts - 2000) ** 2 / 2000).sum() < 21.11  # chi-square, 3 degrees of freedom, 1 - 1e-4


def test_tiles_fit_the_weight():
    """Four tiles of each residue on both sides, or single weights: no row or column of weights is starved."""
    assert fitting_tile_size(2048, 2048, 10, 32) == 32
    assert fitting_tile_size(2600, 650, 10, 32) == 16
    assert fitting_tile_size(10, 2048, 2, 32) == 1
    assert fitting_tile_size(96, 96, 4, 24) == 6
    sampler = make(0.5, keep="any", gamma=1000.0)
    for n_out, n_in in ((64, 700), (130, 100), (333, 65), (41, 57)):
        for _ in range(40):
            sampler.draw()
            pattern = sampler.tiles(n_out, n_in)
            assert pattern.share == pytest.approx(pattern.keep / pattern.dp, abs=0.02)
            for side in (0, 1):
                kept = pattern.mask().double().mean(side) / (pattern.keep / pattern.dp)
                assert kept.min() > 0.7 and kept.max() < 1.3


def test_the_global_generator_is_not_used():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sampler = make(shuffle=True, interleave=True)
    for _ in range(10):
        sampler.draw()
        sampler.pattern(32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    other = make(shuffle=True, interleave=True)
    for _ in range(10):
        other.draw()
        other.pattern(32)
    assert other.pattern(32) == sampler.pattern(32)


def test_a_state_of_another_distribution_is_refused():
    state = make(0.6).state_dict() | {"dp": 99}
    with pytest.raises(ValueError, match=r"\(99, 1\) cannot come from this distribution"):
        make(0.6).load_state_dict(state)


def test_steps_that_drop_nothing_have_the_trivial_pattern():
    sampler = make(0.0)
    sampler.draw()
    assert sampler.pattern(5).keeps_all


def test_ranks_share_the_period_and_differ_in_the_rest():
    samplers = [make(shuffle=True, interleave=True, rank=rank) for rank in (0, 1)]
    draws = [[(s.draw(), s.pattern(64)) for _ in range(300)] for s in samplers]
    assert [pair for pair, _ in draws[0]] == [pair for pair, _ in draws[1]]
    dropping = [(a, b) for (_, a), (_, b) in zip(*draws, strict=True) if not a.keeps_all]
    assert sum(a == b for a, b in dropping) == 0  # 64! orders: never by chance


def test_a_step_does_not_depend_on_how_many_patterns_the_last_one_had():
    few, many = make(shuffle=True), make(shuffle=True)
    for uses in range(1, 6):
        few.draw(), many.draw()
        assert few.pattern(16) == many.pattern(16)
        for _ in range(uses):
            many.pattern(16)


def test_blocks_fit_the_layer():
    """Cells have at least four blocks, whose size is the requested one or a half, a quarter ... of it."""
    assert fitting_block_size(2048, 2, 16) == 16
    assert fitting_block_size(650, 2, 16) == 16
    assert fitting_block_size(650, 3, 16) == 16
    assert fitting_block_size(64, 10, 16) == 1
    assert fitting_block_size(3, 10, 16) == 1
    for n in range(1, 300):
        for dp in range(1, 11):
            size = fitting_block_size(n, dp, 16)
            assert 1 <= size <= 16
            assert 16 % size == 0
            assert size == 1 or n >= 4 * dp * size
            assert size == 16 or n < 4 * dp * 2 * size
    sampler = make(0.5, shuffle=True, interleave=True, gamma=float("inf"), block_size=16)
    sampler.draw()
    assert sampler.pattern(650).block_size == 16
    assert sampler.pattern(100).block_size == 8


def test_large_batches_take_several_orders_of_the_units_in_turn():
    sampler = make(0.5, gamma=float("inf"), interleave=True, shuffle=True, block_size=16, orders=3)  # dp = 2
    for n in (64, 2048):  # in layers of all widths, so that their groups line up
        found = {rows: sampler.pattern(n, leading_shape=(rows, 1)).n_orders for rows in (0, 1, 31, 32, 48, 10_000)}
        assert found == {0: 1, 1: 1, 31: 1, 32: 2, 48: 3, 10_000: 3}
    assert sampler.pattern(64, leading_shape=(32,)).n_orders == 2  # samples alternate between orders as words do
    assert sampler.pattern(64).n_orders == 1  # the batch is unknown
    most = make(0.3, 10, "any", float("inf"), interleave=True, shuffle=True, block_size=16, orders=8)
    assert {most.pattern(1024, leading_shape=shape).n_orders for shape in ((4096,), (64, 64))} == {8}
    fewer = make(0.5, gamma=float("inf"), interleave=True, shuffle=True, block_size=16, orders=8, group_rows=16)
    assert fewer.pattern(128, leading_shape=(128,)).n_orders == 4
    a = sampler.pattern(64, leading_shape=(100, 100))
    assert a.n_groups == 6
    assert len({tuple(line.tolist()) for line in a.mask(6)}) == 6
    assert torch.equal(a.mask(6).sum(0), torch.full((64,), 3))  # each order drops each unit once
    assert sampler.pattern(64, shared=True, leading_shape=(100, 100)).n_orders == 1


def test_every_unit_of_every_row_is_dropped_at_the_rate_with_several_orders():
    rows, n, draws, rate = 12, 13, 2000, 0.7
    sampler = make(rate, 1, "any", 1000.0, interleave=True, shuffle=True, block_size=2, orders=2)
    dropped = torch.zeros(rows, n)
    for _ in range(draws):
        sampler.draw()
        dropped += ~sampler.pattern(n, leading_shape=(100, 10)).mask(rows)
    # 156 normal deviates: Bonferroni at 1e-4 / 156 is 5.1 sd.
    assert ((dropped / draws - rate) / (rate * (1 - rate) / draws) ** 0.5).abs().max() < 5.1


@pytest.mark.parametrize("options", [{}, {"interleave": False, "shuffle": False}, {"pattern": "tile"}])
def test_a_default_device_does_not_reach_patterns(options):
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 8))
    x = torch.randn(30, 64)
    torch.set_default_device("meta")
    try:
        approximate(model, min_gain=0, **options)
        for _ in range(2):
            resample(model)
            model(x).sum().backward()
    finally:
        torch.set_default_device(None)
    assert all(parameter.grad.device.type == "cpu" for parameter in model.parameters())
