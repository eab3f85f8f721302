"""Row patterns against the definition in their docstring, by enumeration."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from approxdrop_lightning import RowPattern
from approxdrop_lightning.patterns.units import Units


@st.composite
def patterns(draw, max_n=40):
    n, dp = draw(st.integers(1, max_n)), draw(st.integers(1, 9))
    block_size = draw(st.sampled_from([1, 2, 3, 8]))
    n_blocks = -(-n // block_size)
    interleave = draw(st.booleans())
    permutations = st.permutations(range(n_blocks)).map(tuple)
    several = st.lists(permutations, min_size=1, max_size=3 if interleave else 1)
    order = draw(st.one_of(st.none(), permutations, several))
    return RowPattern(
        n,
        dp,
        draw(st.integers(0, dp - 1)),
        draw(st.integers(1, dp)),
        interleave,
        None if order is None else torch.tensor(order, dtype=torch.int64),
        block_size,
    )


def kept_by_definition(pattern, unit, group):
    block = unit // pattern.block_size
    groups = groups_by_definition(pattern)
    orders = [range(pattern.n_blocks)] if pattern.order is None else pattern.order.view(-1, pattern.n_blocks).tolist()
    cell = orders[group // groups][block] % pattern.dp
    group %= groups
    shift = pattern.dp - pattern.keep if 2 * pattern.keep > pattern.dp else pattern.keep
    return (cell - pattern.offset - group * shift) % pattern.dp < pattern.keep


def groups_by_definition(pattern):
    """Of one order."""
    if not pattern.interleave or pattern.keep == pattern.dp:
        return 1
    return 2 if 2 * pattern.keep > pattern.dp else pattern.dp // pattern.keep


@given(patterns())
@settings(max_examples=300, deadline=None)
def test_cells_mask_and_counts_follow_the_definition(pattern):
    groups = groups_by_definition(pattern) * pattern.n_orders
    assert len(pattern.cells()) == pattern.n_groups == groups
    mask = pattern.mask(3, 4)
    for t in range(3):
        for b in range(4):
            group = (t + b) % groups
            expected = [kept_by_definition(pattern, j, group) for j in range(pattern.n)]
            assert mask[t, b].tolist() == expected
    for group, kept in enumerate(pattern.cells()):
        expected = [j for j in range(pattern.n) if kept_by_definition(pattern, j, group)]
        assert sorted(kept.tolist()) == expected
        if not pattern.interleave or pattern.keep == 1:
            assert kept.tolist() == expected  # ascending
        assert pattern.units(group).index.tolist() == kept.tolist()
        assert pattern.units(group).count == pattern.counts[group] == len(kept)
        assert sum(pattern.units_by_cell(group)) == len(kept)
    assert pattern.n_kept == len(pattern.cells()[0])
    assert pattern.n_packed((3, 4)) == int(mask.sum())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 12, 13])
@pytest.mark.parametrize("dp", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("interleave", [False, True])
def test_every_unit_is_dropped_with_exactly_the_rate_for_any_n(n, dp, block_size, interleave):
    """Exact enumeration over offsets, for every row of a batch, also where dp does not divide n."""
    for keep in range(1, dp + 1):
        for order in (
            None,
            torch.randperm(-(-n // block_size), generator=torch.Generator().manual_seed(n * dp)),
        ):
            masks = [RowPattern(n, dp, o, keep, interleave, order, block_size).mask(5) for o in range(dp)]
            kept = torch.stack(masks).sum(0)
            assert {Fraction(int(count), dp) for count in kept.view(-1)} == {Fraction(keep, dp)}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_has_its_own_memory(copied):
    """Compiled code receives addresses; those of the original may be invalid when the copy is used."""
    pattern = RowPattern(40, 3, 1, interleave=True, order=torch.randperm(10), block_size=4)
    original = [pattern.units(g).struct for g in range(3)]
    address = pattern.address
    other = copied(pattern)
    assert other.address != address
    for g, struct in enumerate(original):
        units = other.units(g)
        copied_to = (units.struct.starts, units.struct.lengths)
        assert copied_to == (units.starts.data_ptr(), units.lengths.data_ptr())
        assert units.struct.ranges == struct.ranges
        assert copied_to != (struct.starts, struct.lengths)
    assert other == pattern


@given(patterns())
def test_the_share_is_that_of_the_units(pattern):
    kept = [pattern.units(group).count for group in range(pattern.n_groups)]
    assert pattern.share == pytest.approx(sum(kept) / len(kept) / pattern.n)


def test_patterns_without_a_kept_unit():
    pattern = RowPattern(3, dp=8, offset=5)
    assert pattern.n_kept == 0
    assert pattern.share == 0
    assert not pattern.mask(2).any()


def test_equal_patterns_are_equal_and_hash_alike():
    order = torch.tensor([2, 0, 1])
    same = [
        RowPattern(6, 2, 1, order=order, block_size=2),
        RowPattern(6, 2, 1, order=order.clone(), block_size=2),
    ]
    assert same[0] == same[1]
    assert len(set(same)) == 1
    assert same[0] != RowPattern(6, 2, 1, order=torch.tensor([0, 1, 2]), block_size=2)
    assert same[0] != RowPattern(6, 2, 1)
    with pytest.raises(AttributeError):
        same[0].dp = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "dp": 1, "offset": 0}, "n must be an integer in"),
        ({"n": 4, "dp": 0, "offset": 0}, "dp must be an integer in"),
        ({"n": 4, "dp": 2, "offset": 2}, r"offset must be an integer in \[0, 1\], got 2"),
        ({"n": 4, "dp": 2, "offset": 0, "keep": 3}, r"keep must be an integer in \[1, 2\], got 3"),
        ({"n": 4, "dp": 2, "offset": 0.5}, "offset must be an integer"),
        ({"n": 4, "dp": 2, "offset": 0, "block_size": 0}, "block_size must be an integer"),
        ({"n": 4, "dp": 2, "offset": 0, "order": [0, 1, 2]}, "order must be a permutation of 4 blocks"),
        ({"n": 4, "dp": 2, "offset": 0, "order": [0, 1, 1, 2]}, "order must be a permutation of 4 blocks"),
        ({"n": 2, "dp": 2, "offset": 0, "interleave": True, "order": [[0, 1], [1, 1]]}, "permutation of 2 blocks"),
        ({"n": 2, "dp": 2, "offset": 0, "order": [[0, 1], [1, 0]]}, "2 orders need interleave=True"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        RowPattern(**arguments)


def test_units_of_runs():
    for starts, lengths in (([0, 10, 20], [2, 1, 3]), ([7, 3], [2, 2]), ([4, 2], [1, 1]), ([5], [4]), ([], [])):
        units = Units(torch.tensor(starts).long(), torch.tensor(lengths).long(), sum(lengths))
        assert units.index.tolist() == [s + i for s, n in zip(starts, lengths, strict=True) for i in range(n)]
    assert (units + Units.every(3)).index.tolist() == [0, 1, 2]
