"""Patterns of weights against the definition in their docstring, by enumeration."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from approxdrop_lightning import TilePattern


@st.composite
def patterns(draw, most=40):
    dp = draw(st.integers(1, 9))
    return TilePattern(
        draw(st.integers(1, most)),
        draw(st.integers(1, most)),
        dp,
        draw(st.integers(0, dp - 1)),
        draw(st.integers(1, dp)),
        draw(st.sampled_from([1, 2, 3, 8, 32])),
    )


def kept_by_definition(pattern, row, column):
    tiles = row // pattern.tile_size + column // pattern.tile_size
    return (tiles - pattern.offset) % pattern.dp < pattern.keep


@given(patterns())
@settings(max_examples=200, deadline=None)
def test_mask_parts_and_counts_follow_the_definition(pattern):
    expected = torch.tensor(
        [[kept_by_definition(pattern, i, j) for j in range(pattern.n_in)] for i in range(pattern.n_out)]
    )
    assert torch.equal(pattern.mask(), expected)
    assert torch.equal(pattern.t.mask(), expected.t())
    assert pattern.keeps_all or torch.equal(pattern.dropped.mask(), ~expected)
    found = torch.zeros_like(expected)
    for rows, columns in pattern.submatrices():
        for units in (rows, columns):
            assert units.index.tolist() == sorted(units.index.tolist())
            assert units.count == len(units.index)
        found[rows.index[:, None], columns.index] = True
    assert torch.equal(found, expected)
    rows = torch.cat([rows.index for rows, _ in pattern.submatrices()])
    assert rows.sort().values.tolist() == list(range(pattern.n_out))  # each in one part
    assert len(pattern.submatrices()) <= pattern.dp
    assert pattern.n_kept == int(expected.sum())
    assert pattern.share == pytest.approx(expected.double().mean().item())
    assert not pattern.keeps_all or expected.all()


@pytest.mark.parametrize(("n_out", "n_in", "tile_size"), [(7, 13, 3), (1, 5, 1), (33, 4, 8), (6, 6, 32)])
@pytest.mark.parametrize("dp", [1, 2, 3, 5, 8])
def test_every_weight_is_dropped_with_exactly_the_rate_for_any_size(n_out, n_in, tile_size, dp):
    """Exact enumeration over offsets, also where there are fewer tiles than dp."""
    for keep in range(1, dp + 1):
        kept = sum(TilePattern(n_out, n_in, dp, o, keep, tile_size).mask().long() for o in range(dp))
        assert {Fraction(int(count), dp) for count in kept.view(-1)} == {Fraction(keep, dp)}


def test_one_kept_of_dp_is_the_papers_diagonal():
    mask = TilePattern(96, 64, dp=3, offset=2).mask()
    assert [[bool(mask[32 * i, 32 * j]) for j in range(2)] for i in range(3)] == [
        [False, False],
        [False, True],
        [True, False],
    ]


def test_patterns_are_values():
    assert TilePattern(8, 8, 2, 1) == TilePattern(8, 8, 2, 1)
    assert len({TilePattern(8, 8, 2, 1), TilePattern(8, 8, 2, 1), TilePattern(8, 8, 2, 0)}) == 2
    with pytest.raises(AttributeError):
        TilePattern(8, 8, 2, 1).dp = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_out": 0}, "TilePattern: n_out must be an integer in"),
        ({"n_in": 2.0}, "n_in must be an integer in"),
        ({"dp": 0}, "dp must be an integer in"),
        ({"offset": 2}, r"offset must be an integer in \[0, 1\], got 2"),
        ({"keep": 3}, r"keep must be an integer in \[1, 2\], got 3"),
        ({"tile_size": 0}, "tile_size must be an integer in"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TilePattern(**{"n_out": 4, "n_in": 4, "dp": 2, "offset": 0, **arguments})
