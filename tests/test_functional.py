"""Ops against the masked dense definition: outputs and every gradient, float64, ragged shapes."""

import itertools

import pytest
import torch
from support.kernels import kernels  # noqa: F401
from torch import nn

from approxdrop_lightning import RowPattern, functional

KINDS = {
    "shared": {},
    "shared shuffled": {"shuffle": True},
    "interleaved": {"interleave": True},
    "interleaved shuffled": {"interleave": True, "shuffle": True},
    "interleaved blocks of 4": {"interleave": True, "shuffle": True, "block_size": 4},
}


def make_pattern(n, dp, keep, generator, interleave=False, shuffle=False, block_size=1, orders=1):
    permutations = [torch.randperm(-(-n // block_size), generator=generator) for _ in range(orders)]
    order = torch.stack(permutations) if shuffle else None
    offset = int(torch.randint(dp, (), generator=generator))
    return RowPattern(n, dp, offset, keep, interleave, order, block_size)


def masked_linear(x, weight, bias, in_pattern, out_pattern, scale):
    """The definition, written out: mask, multiply, mask."""
    if in_pattern is not None:
        x = x * in_pattern.mask(*x.shape[:-1]).to(x)
    y = nn.functional.linear(x, weight, bias) * scale
    return y if out_pattern is None else y * out_pattern.mask(*y.shape[:-1]).to(y)


def run(x, weight, bias, in_pattern, out_pattern, scale, backend):
    leading = x.shape[:-1]
    packed = x if in_pattern is None else functional.pack(x, in_pattern, backend)
    y = functional.row_linear(packed, weight, bias, in_pattern, out_pattern, scale, backend, leading)
    return y if out_pattern is None else functional.unpack(y, out_pattern, leading, backend)


@pytest.mark.usefixtures("poisoned", "kernels")
@pytest.mark.parametrize("backend", ["compact", "reference"])
@pytest.mark.parametrize("in_kind", [None, *KINDS])
@pytest.mark.parametrize("out_kind", [None, *KINDS])
def test_row_linear_is_the_masked_product(in_kind, out_kind, backend):
    generator = torch.Generator().manual_seed(0)
    shapes = itertools.product(
        [(7,), (3, 5), (1,), (2, 1, 3), (12,), (0,)],  # fewer rows than groups, divisible, ragged, none
        [(12, 8), (13, 7), (1, 5), (6, 1)],  # divisible, ragged, one unit
        [(1, 1), (2, 1), (3, 1), (3, 2), (5, 3), (10, 3), (9, 1)],  # 9, 10: more cells than units
    )
    for leading, (n_in, n_out), (dp, keep) in shapes:
        in_pattern = None if in_kind is None else make_pattern(n_in, dp, keep, generator, **KINDS[in_kind])
        out_pattern = None if out_kind is None else make_pattern(n_out, dp, keep, generator, **KINDS[out_kind])
        bias = leading != (12,)
        tensors = [
            torch.randn(*leading, n_in),
            torch.randn(n_out, n_in),
            *([torch.randn(n_out)] if bias else []),
        ]
        tensors = [t.double().requires_grad_() for t in tensors]
        x, weight, b = tensors if bias else (*tensors, None)
        expected = masked_linear(x, weight, b, in_pattern, out_pattern, 1.5)
        found = run(x, weight, b, in_pattern, out_pattern, 1.5, backend)
        direction = torch.randn(expected.shape, dtype=torch.float64)
        case = (leading, in_pattern, out_pattern)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")
        pairs = zip(
            ("x", "weight", "bias"),
            torch.autograd.grad((found * direction).sum(), tensors),
            torch.autograd.grad((expected * direction).sum(), tensors),
            strict=False,
        )
        for name, got, want in pairs:
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12, msg=lambda m, c=case, n=name: f"{n} {c}: {m}")


@pytest.mark.usefixtures("poisoned", "kernels")
@pytest.mark.parametrize("backend", ["compact", "reference"])
@pytest.mark.parametrize("sides", ["in", "out", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_may_take_several_orders(sides, backend, dtype):
    generator = torch.Generator().manual_seed(0)
    for (dp, keep), orders, leading in itertools.product([(2, 1), (3, 2), (10, 3)], [2, 3], [(3, 5), (40,), (1,)]):
        block, kind = 2, {"interleave": True, "shuffle": True, "orders": orders}
        patterns = [make_pattern(n, dp, keep, generator, block_size=block, **kind) for n in (41, 36)]
        in_pattern, out_pattern = patterns[0] if sides != "out" else None, patterns[1] if sides != "in" else None
        shapes = (*leading, 41), (36, 41), (36,)
        tensors = [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]
        expected = masked_linear(*tensors, in_pattern, out_pattern, 1.5)
        found = run(*tensors, in_pattern, out_pattern, 1.5, backend)
        direction = torch.randn(expected.shape, dtype=dtype, generator=generator)
        got, want = ([y, *torch.autograd.grad((y * direction).sum(), tensors)] for y in (found, expected))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.usefixtures("poisoned", "kernels")
@pytest.mark.parametrize("backend", ["compact", "reference"])
@pytest.mark.parametrize("orders", [1, 2])
@pytest.mark.parametrize("kept", list(itertools.permutations([(2, 1), (10, 7), (3, 2)], 2)))
def test_dropouts_of_two_rates_around_a_layer(kept, orders, backend):
    """The same number of groups before and after, which overlap on one side only or to different degrees."""
    generator = torch.Generator().manual_seed(0)
    settings = {"interleave": True, "shuffle": True, "block_size": 4, "orders": orders}
    patterns = [make_pattern(n, *pair, generator, **settings) for n, pair in zip((52, 41), kept, strict=True)]
    x, weight = (torch.randn(*shape, requires_grad=True) for shape in ((13, 52), (41, 52)))
    y, wanted = run(x, weight, None, *patterns, 1.0, backend), masked_linear(x, weight, None, *patterns, 1.0)
    torch.testing.assert_close(y, wanted)
    for mine, right in zip(
        *(torch.autograd.grad(out.square().sum(), (x, weight)) for out in (y, wanted)), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("kind", list(KINDS))
def test_gradcheck(kind, keep):
    generator = torch.Generator().manual_seed(1)
    in_pattern = make_pattern(6, 3, keep, generator, **KINDS[kind])
    out_pattern = make_pattern(5, 3, keep, generator, **KINDS[kind])
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 6), (5, 6), (5,)))

    def function(x, weight, bias):
        packed = functional.pack(x, in_pattern)
        y = functional.row_linear(packed, weight, bias, in_pattern, out_pattern, leading_shape=(2, 4))
        return functional.unpack(y, out_pattern, (2, 4))

    assert torch.autograd.gradcheck(function, (x, weight, bias))


def test_the_contract_of_a_shared_pattern_literally():
    x, weight, bias = torch.randn(3, 5, 4), torch.randn(10, 8), torch.randn(10)
    inside, outside = RowPattern(8, 2, 1), RowPattern(10, 3, 2)
    y = functional.row_linear(x, weight, bias, inside, outside, scale=2.0)
    expected = 2.0 * (x @ weight[outside.kept][:, inside.kept].T + bias[outside.kept])
    torch.testing.assert_close(y, expected)


def test_pattern_that_keeps_nothing_gives_the_bias_and_zero_gradients():
    x = torch.randn(4, 3, requires_grad=True)
    weight, bias = torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    nothing = RowPattern(3, dp=8, offset=6)
    y = functional.row_linear(functional.pack(x, nothing), weight, bias, nothing)
    torch.testing.assert_close(y, bias.expand(4, 5))
    y.sum().backward()
    assert not x.grad.any()
    assert not weight.grad.any()
    assert bias.grad.eq(4).all()


def test_compact_multiplies_only_what_is_kept():
    """1 / dp^2 of the dense multiplies between two patterns, forward and in both gradients."""
    from torch.utils.flop_counter import FlopCounterMode

    n, rows, dp = 64, 32, 4
    x = torch.randn(rows, n, requires_grad=True)
    weight = torch.randn(n, n, requires_grad=True)
    for interleave in (False, True):
        inside, outside = (RowPattern(n, dp, o, interleave=interleave) for o in (1, 2))
        with FlopCounterMode(display=False) as counter:
            packed = functional.pack(x, inside)
            functional.row_linear(packed, weight, None, inside, outside, leading_shape=(rows,)).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * rows * n * n // dp**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_strides(dtype):
    pattern = RowPattern(16, 2, 1, interleave=True, order=torch.randperm(16))
    x = torch.randn(16, 6).to(dtype).t()  # not contiguous
    weight = torch.randn(16, 12).to(dtype).t()
    found = functional.row_linear(functional.pack(x, pattern), weight, None, pattern, leading_shape=(6,))
    assert found.dtype == dtype
    expected = masked_linear(x.double(), weight.double(), None, pattern, None, 1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1  # bf16 keeps 8 bits; sums of 8 products of size 1
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_autocast_casts_as_for_a_linear_layer():
    pattern = RowPattern(16, 2, 1, interleave=True)
    x, weight = torch.randn(6, 16), torch.randn(12, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.row_linear(functional.pack(x, pattern), weight, None, pattern, leading_shape=(6,))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_scratch_memory_is_never_handed_out():
    """Two results of one shape must not share memory, nor change when a third is made."""
    pattern = RowPattern(8, 2, 0, interleave=True)
    x, weight = torch.randn(6, 8), torch.randn(5, 8)
    packed = functional.pack(x, pattern)
    first = functional.row_linear(packed, weight, None, pattern, leading_shape=(6,))
    copy = first.clone()
    functional.row_linear(packed * 3, weight, None, pattern, leading_shape=(6,))
    assert torch.equal(first, copy)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_lstm_sequence_is_nn_lstm(batch, steps, bias):
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 6, bias=bias).double()
    x = torch.randn(steps, batch, 5, dtype=torch.float64)
    state = [torch.randn(batch, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y, (h, c) = lstm(x, (state[0][None], state[1][None]))
    biases = lstm.bias_ih_l0 + lstm.bias_hh_l0 if bias else None
    gates = functional.row_linear(x, lstm.weight_ih_l0, biases)
    found = functional.lstm_sequence(gates, *state, lstm.weight_hh_l0)
    directions = [torch.randn_like(t) for t in found]
    inputs = [*state, *lstm.parameters()]
    expected = (y, h[0], c[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    gradients = [
        torch.autograd.grad(sum((a * d).sum() for a, d in zip(out, directions, strict=True)), inputs)
        for out in (found, expected)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("enabled", [True, False])
def test_lstm_sequence_with_a_packed_weight_is_nn_lstm(enabled):
    """Wide enough for the packed product, in single precision: errors of sums of 416 products."""
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 416)
    x, state = torch.randn(6, 5, 8), [torch.randn(5, 416, requires_grad=True) for _ in range(2)]
    expected = lstm(x, (state[0][None], state[1][None]))[0]
    inputs = [*state, *lstm.parameters()]
    direction = torch.randn_like(expected)
    want = torch.autograd.grad((expected * direction).sum(), inputs)
    with torch.backends.mkldnn.flags(enabled=enabled):
        gates = functional.row_linear(x, lstm.weight_ih_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0)
        found = functional.lstm_sequence(gates, *state, lstm.weight_hh_l0)[0]
        got = torch.autograd.grad((found * direction).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["compact", "reference"])
@pytest.mark.parametrize("in_pattern", [None, RowPattern(6, 2, 0)])
def test_a_layer_without_outputs(backend, in_pattern):
    x = torch.ones(5, 6 if in_pattern is None else 3)
    assert functional.row_linear(x, torch.ones(0, 6), None, in_pattern, backend=backend).shape == (5, 0)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("which", range(4))
def test_lstm_sequence_refuses_mixed_types(which, other):
    """Compiled code would read the bytes of one type as those of another."""
    tensors = [torch.ones(2, 3, 16), torch.ones(3, 4), torch.ones(3, 4), torch.ones(16, 4)]
    tensors[which] = tensors[which].to(other)
    with pytest.raises(
        ValueError, match=f"lstm_sequence: all must be of one floating-point type and on one device, got .*{other}"
    ):
        functional.lstm_sequence(*tensors)


def test_lstm_sequence_gradcheck_with_and_without_recurrent_pattern():
    gates, h, c, weight = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 16), (2, 4), (2, 4), (16, 4))
    )
    for pattern in (None, RowPattern(4, 2, 1), RowPattern(4, 9, 8)):
        assert torch.autograd.gradcheck(
            lambda *a, p=pattern: functional.lstm_sequence(*a, pattern=p, scale=1.5), (gates, h, c, weight)
        )


def test_lstm_sequence_with_a_pattern_masks_the_recurrent_input():
    gates, h0, c0, weight = torch.randn(4, 2, 20), torch.randn(2, 5), torch.randn(2, 5), torch.randn(20, 5)
    pattern = RowPattern(5, 2, 1)
    h, c, outputs = h0, c0, []
    for gate in gates:
        i, f, g, o = (gate + (h * pattern.mask(2) * 2.0) @ weight.T).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    found = functional.lstm_sequence(gates, h0, c0, weight, pattern, scale=2.0)
    torch.testing.assert_close(found[0], torch.stack(outputs))
    torch.testing.assert_close(found[2], c)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: functional.row_linear(torch.randn(2, 3), torch.randn(4, 5)), r"x must be \[..., 5\]"),
        (lambda: functional.row_linear(torch.randn(2, 5), torch.randn(5)), "weight must be"),
        (
            lambda: functional.row_linear(torch.randn(2, 5), torch.randn(4, 5), torch.randn(5)),
            r"bias must be \[4\]",
        ),
        (
            lambda: functional.row_linear(torch.randn(2, 5), torch.randn(4, 5), backend="magic"),
            "backend must be one of .*'magic'",
        ),
        (
            lambda: functional.row_linear(torch.randn(2, 5), torch.randn(4, 5), None, RowPattern(6, 2, 0)),
            "in_pattern is of 6 units, the weight has 5",
        ),
        (
            lambda: functional.row_linear(torch.randn(2, 5), torch.randn(4, 5), None, RowPattern(5, 2, 0)),
            "keeps 3 of 5 units",
        ),
        (
            lambda: functional.row_linear(
                torch.randn(6), torch.randn(4, 4), None, RowPattern(4, 2, 0, interleave=True)
            ),
            "leading_shape is needed",
        ),
        (
            lambda: functional.row_linear(
                torch.randn(4),
                torch.randn(4, 4),
                None,
                RowPattern(4, 2, 0, interleave=True),
                RowPattern(4, 3, 0, interleave=True),
                leading_shape=(2,),
            ),
            "must have the same number of groups, got 2 in and 3 out",
        ),
        (lambda: functional.pack(torch.randn(2, 3), RowPattern(4, 2, 0)), "pattern is of 4 units"),
        (
            lambda: functional.unpack(torch.randn(3), RowPattern(4, 2, 0, interleave=True), (2,)),
            "keeps 4 values of a batch",
        ),
        (
            lambda: functional.lstm_sequence(
                torch.randn(0, 2, 8), torch.randn(2, 2), torch.randn(2, 2), torch.randn(8, 2)
            ),
            "gates must be",
        ),
        (
            lambda: functional.lstm_sequence(
                torch.randn(1, 2, 8), torch.randn(2, 3), torch.randn(2, 2), torch.randn(8, 2)
            ),
            r"h0 must be \[2, 2\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
