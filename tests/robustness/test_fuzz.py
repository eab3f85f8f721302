"""Arbitrary arguments give the value of the definition or an error that says what is wrong, nothing else."""

import math
import warnings

import pytest
import torch
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.fuzz import came_of_it, examples, fuzz
from support.kernels import kernels  # noqa: F401

from approxdrop_lightning import (
    ApproxDropout,
    PatternDistribution,
    PatternSampler,
    RowPattern,
    TilePattern,
    functional,
)
from approxdrop_lightning.patterns.tile import BernoulliPattern

ODD = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.floats(), st.integers(-5, 5), st.just([]))
RATES = st.one_of(
    st.floats(0, 1, exclude_max=True),
    st.floats(),
    st.sampled_from(
        [0.0, -0.0, 5e-324, 1e-12, 1 / 3, 0.5, 0.9, 0.99, 1 - 2**-53, 1.0, math.nan, math.inf, True, "0.5"]
    ),
)


@examples(60, 20_000)
def test_a_distribution_meets_its_rate_or_the_arguments_are_refused(number):
    def search(rate, max_dp, concentration, keep):
        try:
            found = PatternDistribution.search(rate, max_dp, keep=keep, concentration=concentration)
        except ValueError as error:
            assert str(error)
            return
        assert 0 <= rate < 1
        assert concentration >= 0
        assert len(found.support) == len(found.probabilities)
        assert all(0 <= k <= 1 for k in found.probabilities)
        assert abs(sum(found.probabilities) - 1) < 1e-12
        assert abs(found.expected_rate - rate) < 1e-9
        assert math.isfinite(found.entropy)
        assert 0 <= found.rate_std <= 0.5
        assert all(1 <= kept <= dp <= max_dp for dp, kept in found.support)
        PatternSampler(found).draw()

    concentrations = st.one_of(
        st.floats(0, 1e7), st.floats(), st.sampled_from([0.0, math.inf, math.nan, -1.0, 1e308])
    )
    periods = st.one_of(st.integers(1, 40), st.integers(-3, 3), ODD)
    keeps = st.one_of(st.sampled_from(["one", "any"]), ODD)
    fuzz(number, search, rate=RATES, max_dp=periods, concentration=concentrations, keep=keeps)


@examples(0, 40)
def test_the_papers_search_meets_its_rate_or_warns(number):
    def search(rate, max_dp, concentration):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = PatternDistribution.search(rate, max_dp, method="sgd", concentration=concentration)
            except ValueError:
                assert rate > (max_dp - 1) / max_dp
                return
        assert abs(sum(found.probabilities) - 1) < 1e-9
        assert min(found.probabilities) >= 0
        assert caught or abs(found.expected_rate - rate) <= 1e-3

    fuzz(number, search, rate=st.floats(0.01, 0.9), max_dp=st.integers(2, 12), concentration=st.floats(0, 500))


@examples(50, 10_000)
def test_the_callback_takes_any_argument_or_refuses_it(number):
    def make(name, value):
        try:
            callback = ApproxDropout(**{name: value})
        except MisconfigurationException as error:
            assert str(error).startswith("ApproxDropout: ")
            return
        assert getattr(callback.options, name, getattr(callback, name, None)) == value

    names = st.sampled_from([
        "rate", "pattern", "interleave", "shuffle", "block_size", "max_dp", "keep", "concentration", "search",
        "scale", "recurrent", "tile_size", "min_gain", "backend", "seed", "resample",
    ])  # fmt: skip
    values = st.one_of(ODD, RATES, st.sampled_from(["tile", "any", "dp", "step"]))
    fuzz(number, make, name=names, value=values)


@examples(60, 20_000)
def test_a_row_pattern_is_its_definition_or_refused(number):
    def make(n, dp, offset, keep, interleave, order, block_size):
        try:
            pattern = RowPattern(n, dp, offset, keep, interleave, order, block_size)
        except (ValueError, TypeError, RuntimeError) as error:
            assert str(error)
            valid = [type(v) is int for v in (n, dp, offset, keep, block_size)]
            in_range = all(valid) and n >= 1 and dp >= 1 and block_size >= 1 and 0 <= offset < dp and 1 <= keep <= dp
            assert not in_range or order is not None
            return
        blocks = -(-n // block_size)
        places = list(range(blocks)) if order is None else list(order)
        assert sorted(places) == list(range(blocks))
        cell = [places[j // block_size] % dp for j in range(n)]
        mask = pattern.mask(5)
        for row in range(5):
            first = offset + (row % pattern.n_groups) * (dp - keep if pattern.overlaps else keep)
            kept = [(c - first) % dp < keep for c in cell]
            assert mask[row].tolist() == kept
        assert sum(units.count for units in pattern._units) == sum(len(c) for c in pattern.cells())
        assert pattern.kept.tolist() == pattern.cells()[0].tolist()

    small = st.integers(1, 12)
    whole = st.one_of(small, ODD)
    fuzz(
        number, make, n=st.one_of(st.integers(1, 60), whole), dp=whole, offset=st.one_of(st.integers(0, 11), whole),
        keep=whole, interleave=st.booleans(), block_size=whole,
        order=st.one_of(
            st.none(), st.integers(1, 30).flatmap(lambda n: st.permutations(range(n))),
            st.lists(st.integers(-3, 8), max_size=5),
        ),
    )  # fmt: skip


@examples(50, 10_000)
def test_a_tile_pattern_is_its_definition_or_refused(number):
    def make(n_out, n_in, dp, offset, keep, tile_size):
        try:
            pattern = TilePattern(n_out, n_in, dp, offset, keep, tile_size)
        except ValueError as error:
            assert str(error)
            return
        mask = torch.tensor(
            [[(i // tile_size + j // tile_size - offset) % dp < keep for j in range(n_in)] for i in range(n_out)]
        )
        assert torch.equal(pattern.mask(), mask)
        assert pattern.n_kept == int(mask.sum())
        built = torch.zeros(n_out, n_in, dtype=torch.bool)
        for rows, columns in pattern.submatrices():
            built[rows.index[:, None], columns.index] = True
        assert torch.equal(built, mask)

    whole = st.one_of(st.integers(1, 9), st.integers(1, 9), ODD)
    sizes = st.one_of(st.integers(1, 40), whole)
    fuzz(number, make, n_out=sizes, n_in=sizes, dp=whole, offset=whole, keep=whole, tile_size=whole)


LAYOUTS = ("plain", "transposed", "every second", "reversed order", "view at an odd place", "expanded")
DTYPES = st.sampled_from(
    [torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)


def tensor(generator, shape, dtype=torch.float32, layout="plain", grad=False, unit=1.0):
    """Values that every type can hold exactly, so that only sums differ by rounding."""
    values = torch.randint(-4, 5, shape, generator=generator).to(dtype)
    if dtype.is_floating_point:
        values *= unit
    if layout == "transposed" and values.dim() > 1:
        values = values.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "every second" and values.dim():
        wide = values.new_zeros(*shape[:-1], 2 * shape[-1])
        wide[..., ::2] = values
        values = wide[..., ::2]
    elif layout == "reversed order" and values.dim() > 1:
        values = values.permute(*reversed(range(values.dim()))).contiguous().permute(*reversed(range(values.dim())))
    elif layout == "view at an odd place":
        values = torch.cat([values.new_zeros(3), values.reshape(-1)])[3:].view(shape)
    elif layout == "expanded" and values.dim() > 1 and shape[0]:
        values = values[:1].expand(shape)
    values = values.detach()
    return values.requires_grad_() if grad and dtype.is_floating_point else values


def outcome(call, leaves):
    """Value and gradients of a call, or the error it raised."""
    for leaf in leaves:
        leaf.grad = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = call()
            values = values if isinstance(values, tuple) else (values,)
            if any(value.requires_grad for value in values):
                # Small whole numbers as the direction: gradients of squares would lose digits in 16 bits.
                sum((v.float() * (torch.arange(v.numel()).view(v.shape) % 3 - 1)).sum() for v in values).backward()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        assert str(error)
        assert "INTERNAL ASSERT" not in str(error)
        return error
    return [v.detach() for v in values], [leaf.grad for leaf in leaves]


def same(found, expected):
    if isinstance(found, Exception):
        came_of_it("refused" if isinstance(expected, Exception) else "refused, though the definition would take it")
        return
    assert not isinstance(expected, Exception), f"the definition refuses this: {expected!r}"
    came_of_it("equal to the reference")
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            small = a.dtype in (torch.float16, torch.bfloat16)
            torch.testing.assert_close(
                a.double(), b.double(), rtol=0.03 if small else 1e-5, atol=1.0 if small else 1e-4, equal_nan=True
            )


def row_pattern(draw, n):
    if draw(st.integers(0, 3)) == 0:
        return None
    dp = draw(st.integers(1, 7))
    block_size = draw(st.sampled_from([1, 1, 2, 4, 8, 16]))
    order = draw(st.one_of(st.none(), st.permutations(range(-(-n // block_size)))))
    return RowPattern(
        n, dp, draw(st.integers(0, dp - 1)), draw(st.integers(1, dp)), draw(st.booleans()), order, block_size
    )


def patterns(draw, n_in, n_out):
    """Patterns of the inputs and outputs of a layer, usually of one step."""
    inside, outside = row_pattern(draw, n_in), row_pattern(draw, n_out)
    if inside and outside and draw(st.integers(0, 5)):
        dp, keep, offset = inside.dp, inside.keep, min(outside.offset, inside.dp - 1)
        outside = RowPattern(n_out, dp, offset, keep, outside.interleave, outside.order, outside.block_size)
    return inside, outside


SIZES = st.one_of(st.integers(1, 12), st.integers(1, 12), st.integers(13, 70))
LEADING = st.lists(st.integers(0, 6), max_size=3).map(tuple)
WRONG = st.integers(0, 39)  # 0: a shape that does not fit


@st.composite
def row_arguments(draw):
    n_in, n_out = draw(SIZES), draw(SIZES)
    dtype = draw(DTYPES)
    dtypes = [dtype] * 3 if draw(st.integers(0, 9)) else [draw(DTYPES) for _ in range(3)]
    wrong = [draw(st.integers(-1, 1)) if draw(WRONG) == 0 else 0 for _ in range(4)]
    return {
        "sizes": (n_in, n_out),
        "patterns": patterns(draw, n_in, n_out),
        "leading": draw(LEADING),
        "dtypes": dtypes,
        "layouts": [draw(st.sampled_from(LAYOUTS)) for _ in range(3)],
        "grads": [draw(st.booleans()) for _ in range(3)],
        "bias": draw(st.booleans()),
        "wrong": wrong,
        "scale": draw(st.sampled_from([1.0, 2.0, 0.5, 0.0])),
        "activation": draw(st.sampled_from(["identity", "identity", "relu", "gelu", "tanh"])),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.usefixtures("poisoned", "kernels")
@examples(40, 5_000)
def test_row_linear(number):
    def check(given):
        generator = torch.Generator().manual_seed(given["seed"])
        (n_in, n_out), (in_pattern, out_pattern), leading = given["sizes"], given["patterns"], given["leading"]
        wrong = given["wrong"]
        kinds = list(zip(given["dtypes"], given["layouts"], given["grads"], strict=True))
        if in_pattern is None:
            x_shape = (*leading, max(0, n_in + wrong[0]))
        elif in_pattern.interleave:
            counts = (r.count * in_pattern.units(g).count for g, r in enumerate(in_pattern.row_groups(leading)))
            x_shape = (max(0, sum(counts) + wrong[0]),)
        else:
            x_shape = (*leading, max(0, in_pattern.n_kept + wrong[0]))
        x = tensor(generator, x_shape, *kinds[0])
        weight = tensor(generator, (max(0, n_out + wrong[1]), max(0, n_in + wrong[2])), *kinds[1])
        bias = tensor(generator, (max(0, n_out + wrong[3]),), *kinds[2]) if given["bias"] else None
        leaves = [t for t in (x, weight, bias) if t is not None and t.requires_grad]

        def call(backend):
            return functional.row_linear(
                x, weight, bias, in_pattern, out_pattern, given["scale"], backend, leading, given["activation"]
            )

        expected = outcome(lambda: call("reference"), leaves)
        same(outcome(lambda: call("compact"), leaves), expected)

    fuzz(number, check, given=row_arguments())


@st.composite
def tile_arguments(draw):
    n_in, n_out = draw(SIZES), draw(SIZES)
    dtype = draw(DTYPES)
    dp = draw(st.integers(1, 6))
    if draw(st.integers(0, 4)):
        offset, keep = draw(st.integers(0, dp - 1)), draw(st.integers(1, dp))
        pattern = TilePattern(n_out, n_in, dp, offset, keep, draw(st.sampled_from([1, 2, 4, 8, 16])))
    else:
        pattern = BernoulliPattern(n_out, n_in, draw(st.floats(0, 0.9)), draw(st.integers(0, 99)))
    return {
        "pattern": pattern,
        "leading": draw(LEADING),
        "dtypes": [dtype] * 3 if draw(st.integers(0, 9)) else [draw(DTYPES) for _ in range(3)],
        "layouts": [draw(st.sampled_from(LAYOUTS)) for _ in range(3)],
        "grads": [draw(st.booleans()) for _ in range(3)],
        "bias": draw(st.booleans()),
        "wrong": [draw(st.integers(-1, 1)) if draw(WRONG) == 0 else 0 for _ in range(4)],
        "scale": draw(st.sampled_from([1.0, 2.0, 0.5, 0.0])),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.usefixtures("poisoned", "kernels")
@examples(30, 4_000)
def test_tile_linear(number):
    def check(given):
        generator, pattern, wrong = torch.Generator().manual_seed(given["seed"]), given["pattern"], given["wrong"]
        kinds = list(zip(given["dtypes"], given["layouts"], given["grads"], strict=True))
        x = tensor(generator, (*given["leading"], max(0, pattern.n_in + wrong[0])), *kinds[0])
        weight = tensor(generator, (max(0, pattern.n_out + wrong[1]), max(0, pattern.n_in + wrong[2])), *kinds[1])
        bias = tensor(generator, (max(0, pattern.n_out + wrong[3]),), *kinds[2]) if given["bias"] else None
        leaves = [t for t in (x, weight, bias) if t is not None and t.requires_grad]

        def call(backend):
            return functional.tile_linear(x, weight, bias, pattern, given["scale"], backend)

        expected = outcome(lambda: call("reference"), leaves)
        same(outcome(lambda: call("compact"), leaves), expected)

    fuzz(number, check, given=tile_arguments())


@st.composite
def pack_arguments(draw):
    n = draw(SIZES)
    pattern = None
    while pattern is None:
        pattern = row_pattern(draw, n)
    return {
        "pattern": pattern,
        "leading": draw(LEADING),
        "kind": (draw(DTYPES), draw(st.sampled_from(LAYOUTS)), draw(st.booleans())),
        "wrong": draw(st.integers(-1, 1)) if draw(WRONG) == 0 else 0,
        "shape_given": draw(st.sampled_from([True, True, True, False])),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.usefixtures("poisoned", "kernels")
@examples(15, 8_000)
def test_pack_and_unpack(number):
    def check(given):
        pattern, leading = given["pattern"], given["leading"]
        generator = torch.Generator().manual_seed(given["seed"])
        x = tensor(generator, (*leading, max(0, pattern.n + given["wrong"])), *given["kind"])
        leaves = [x] if x.requires_grad else []
        packed = outcome(lambda: functional.pack(x, pattern, "compact"), leaves)
        same(packed, outcome(lambda: functional.pack(x, pattern, "reference"), leaves))
        if isinstance(packed, Exception):
            return
        shape = leading if given["shape_given"] else None
        there_and_back = outcome(
            lambda: functional.unpack(functional.pack(x, pattern, "compact"), pattern, shape, "compact"), leaves
        )
        if isinstance(there_and_back, Exception):
            assert shape is None
            return
        assert torch.equal(there_and_back[0][0], x.detach() * pattern.mask(*leading))

    fuzz(number, check, given=pack_arguments())


def plain_lstm(gates, h, c, weight_hh, pattern, scale):
    """The recurrence as defined in its docstring, step by step."""
    mask = 1 if pattern is None else pattern.mask().to(h)
    outputs = []
    for step in gates:
        i, f, g, o = (step + torch.nn.functional.linear(h * mask * scale, weight_hh)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs), h, c


@st.composite
def lstm_arguments(draw):
    hidden = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 32, 40])))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
    mixed = draw(st.integers(0, 9)) == 0
    pattern = row_pattern(draw, hidden)
    if pattern is not None and draw(st.integers(0, 9)):
        pattern = RowPattern(
            hidden, pattern.dp, pattern.offset, pattern.keep, False, pattern.order, pattern.block_size
        )
    return {
        "sizes": (draw(st.sampled_from([1, 2, 3, 4, 5, 1, 2, 3, 4, 0])), draw(st.integers(0, 6)), hidden),
        "pattern": pattern,
        "kinds": [
            (draw(DTYPES) if mixed else dtype, draw(st.sampled_from(LAYOUTS)), draw(st.booleans())) for _ in range(4)
        ],
        "wrong": [draw(st.integers(-1, 1)) if draw(WRONG) == 0 else 0 for _ in range(4)],
        "scale": draw(st.sampled_from([1.0, 2.0, 0.5])),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.usefixtures("kernels")
@examples(30, 4_000)
def test_lstm_sequence(number):
    def check(given):
        generator = torch.Generator().manual_seed(given["seed"])
        (steps, batch, hidden), wrong = given["sizes"], given["wrong"]
        shapes = (
            (steps, batch, max(0, 4 * hidden + wrong[0])),
            (max(0, batch + wrong[1]), hidden),
            (batch, max(0, hidden + wrong[2])),
            (4 * hidden, max(0, hidden + wrong[3])),
        )
        # Small: with large weights a recurrence is chaotic and depends on the order of summation.
        tensors = [
            tensor(generator, shape, *kind, unit=1 / 16) for shape, kind in zip(shapes, given["kinds"], strict=True)
        ]
        leaves = [t for t in tensors if t.requires_grad]
        arguments = (*tensors, given["pattern"], given["scale"])
        found = outcome(lambda: functional.lstm_sequence(*arguments), leaves)
        if isinstance(found, Exception):
            same(found, found)  # batches that are broadcast to one another are refused, for one
            return
        assert given["pattern"] is None or not given["pattern"].interleave
        same(found, outcome(lambda: plain_lstm(*arguments), leaves))

    fuzz(number, check, given=lstm_arguments())
