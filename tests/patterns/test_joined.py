"""Joined patterns keep what their pieces keep, and products between them are those of the masked weights."""

import pytest
import torch

from approxdrop_lightning import functional
from approxdrop_lightning.distribution import PatternDistribution
from approxdrop_lightning.ops.row_linear import joined
from approxdrop_lightning.patterns.joined import JoinedPattern, join
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.sampler import PatternSampler

CASES = {
    "shared": (0.5, {}, (12,), [64, 32]),
    "shared, shuffled": (0.7, {"shuffle": True, "block_size": 4}, (12,), [64, 32, 37]),
    "interleaved": (0.5, {"interleave": True}, (13,), [64, 30]),
    "shuffled": (0.7, {"interleave": True, "shuffle": True, "block_size": 16}, (24,), [256, 48, 100]),
    "groups that overlap": (0.3, {"interleave": True, "shuffle": True, "block_size": 8}, (9,), [160, 96, 50]),
    "several orders": (0.5, {"interleave": True, "shuffle": True, "block_size": 4, "orders": 3}, (20, 20), [128, 96]),
}


def draw(rate, options, leading, widths, seed=0):
    sampler = PatternSampler(PatternDistribution.search(rate, 10, "maxent", "any", 1000.0), seed=seed, **options)
    return [sampler.pattern(n, leading_shape=leading) for n in widths]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("seed", range(3))
def test_it_keeps_what_its_pieces_keep(case, seed):
    pieces = draw(*CASES[case], seed=seed)
    rate, _, leading, widths = CASES[case]
    pattern = join(pieces)
    assert isinstance(pattern, JoinedPattern) and pattern.n == sum(widths)
    if case == "several orders":
        assert pattern.n_orders == 3
    mask = torch.cat([piece.mask(*leading) for piece in pieces], dim=-1)
    assert torch.equal(pattern.mask(*leading), mask)
    x = torch.arange(1.0, mask.numel() + 1).view(mask.shape)
    packed = functional.pack(x, pattern)
    torch.testing.assert_close(functional.unpack(packed, pattern, leading), x * mask, rtol=0, atol=0)
    groups = [sorted(units.index.tolist()) for units in pattern._units]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    for g, units in enumerate(groups):
        wanted = [s + u for piece, s in zip(pieces, starts, strict=True) for u in piece.units(g).index.tolist()]
        assert units == sorted(wanted)
    assert pattern.share == pytest.approx(sum(len(units) for units in groups) / len(groups) / sum(widths))
    assert abs(pattern.share - (1 - rate)) < 0.1


@pytest.mark.parametrize("case", list(CASES))
def test_values_side_by_side_are_packed_as_the_whole_would_be(case):
    pieces = draw(*CASES[case])
    _, _, leading, widths = CASES[case]
    pattern = join(pieces)
    xs = [torch.randn(*leading, n, dtype=torch.float64, requires_grad=True) for n in widths]

    def packed(*xs):
        values = tuple(functional.pack(x, piece) for x, piece in zip(xs, pieces, strict=True))
        return joined.cat(values, pattern, leading)

    torch.testing.assert_close(packed(*xs), functional.pack(torch.cat(xs, -1), pattern), rtol=0, atol=0)
    weight = torch.randn_like(packed(*xs))
    found = torch.autograd.grad((packed(*xs) * weight).sum(), xs)
    wanted = torch.autograd.grad((functional.pack(torch.cat(xs, -1), pattern) * weight).sum(), xs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_its_derivatives_may_be_differentiated():
    pieces = draw(0.5, {"interleave": True}, (5,), [4, 6])
    pattern = join(pieces)
    values = [functional.pack(torch.randn(5, p.n, dtype=torch.float64), p).requires_grad_() for p in pieces]
    assert torch.autograd.gradcheck(lambda *v: joined.cat(v, pattern, (5,)), values)
    assert torch.autograd.gradgradcheck(lambda *v: joined.cat(v, pattern, (5,)), values)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("backend", ["compact", "reference"])
def test_products_are_those_of_the_masked_weight(case, backend):
    pieces = draw(*CASES[case])
    _, _, leading, widths = CASES[case]
    pattern = join(pieces)
    n = sum(widths)
    weight, bias = torch.randn(48, n, requires_grad=True), torch.randn(48, requires_grad=True)
    x = torch.randn(*leading, n, requires_grad=True)
    y = functional.row_linear(
        functional.pack(x, pattern), weight, bias, pattern, backend=backend, leading_shape=leading
    )
    dense = torch.nn.functional.linear(x * pattern.mask(*leading), weight, bias)
    grad = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(one, (x, weight, bias), grad) for one in (y, dense))
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_pieces_of_different_blocks_are_joined():
    """Narrow pieces have narrow blocks, but as many orders for the same batch."""
    options = {"interleave": True, "shuffle": True, "block_size": 16, "orders": 8}
    pieces = draw(0.5, options, (160,), [512, 64, 512], 1)
    assert [piece.block_size for piece in pieces] == [16, 8, 16]
    pattern = join(pieces)
    assert pattern.n_orders == 8
    assert torch.equal(pattern.mask(160), torch.cat([piece.mask(160) for piece in pieces], dim=-1))


def test_patterns_whose_rows_fall_into_other_groups_are_not_joined():
    assert join([RowPattern(8, 2, 0), RowPattern(8, 3, 0)]) is None
    assert join([RowPattern(8, 2, 0), RowPattern(8, 2, 1, interleave=True)]) is None
    assert join([RowPattern(8, 1, 0), RowPattern(8, 1, 0)]) is None
    nested = join([join([RowPattern(8, 2, 0), RowPattern(4, 2, 1)]), RowPattern(6, 2, 1)])
    assert [piece.n for piece in nested.pieces] == [8, 4, 6]
