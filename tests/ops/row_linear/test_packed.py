"""Products of packed operands, with kernels in the interpreter, against the masked dense definition."""

import pytest
import torch
from support.skipping import assert_skips
from support.triton_cases import TOLERANCE, TYPES, assert_is_the_reference, make_pattern
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from approxdrop_lightning import RowPattern, approximate, functional, resample
from approxdrop_lightning.ops.pack import pack_ops

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]

KINDS = {
    "none": None,
    "shared, several cells": {},
    "shared shuffled": {"shuffle": True},
    "interleaved": {"interleave": True},
    "interleaved shuffled": {"interleave": True, "shuffle": True},
    "interleaved blocks of 8": {"interleave": True, "shuffle": True, "block_size": 8},
}


def pattern(kind, n, dp, keep):
    return None if KINDS[kind] is None else make_pattern(n, dp, keep, **KINDS[kind])


@pytest.mark.parametrize("in_kind", KINDS)
@pytest.mark.parametrize("out_kind", KINDS)
def test_every_pair_of_kinds(in_kind, out_kind):
    """(3, 2): groups keep units in common. 31 and 33: no size is even. 48 and 64: loads of 16 bytes."""
    for (dp, keep), (n_in, n_out), leading in (((3, 2), (31, 33), (7,)), ((4, 1), (64, 48), (3, 5))):
        assert_is_the_reference(
            leading, n_in, n_out, pattern(in_kind, n_in, dp, keep), pattern(out_kind, n_out, dp, keep)
        )


@pytest.mark.parametrize("sides", ["in", "out", "both"])
@pytest.mark.parametrize(("dp", "keep"), [(2, 1), (3, 2), (10, 3)])
def test_rows_may_take_several_orders(dp, keep, sides):
    for orders, (n_in, n_out), leading in ((2, (64, 80), (3, 5)), (3, (41, 36), (30,)), (2, (32, 32), (1,))):
        kind = {"interleave": True, "shuffle": True, "block_size": 8, "orders": orders}
        inside, outside = (make_pattern(n, dp, keep, **kind) for n in (n_in, n_out))
        assert_is_the_reference(
            leading, n_in, n_out, None if sides == "out" else inside, None if sides == "in" else outside
        )


@pytest.mark.parametrize("dp", range(1, 9))
def test_every_period_and_number_of_kept_cells(dp):
    for keep in sorted({1, max(dp // 2, 1), dp // 2 + 1, dp}):  # up to half of the cells, more, all
        sides = [pattern("interleaved blocks of 8", n, dp, keep) for n in (66, 63)]
        assert_is_the_reference((2, 9), 66, 63, *sides, bias=keep != 2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("leading", "n_in", "n_out"),
    [
        ((1,), 64, 64),  # fewer rows than groups
        ((130,), 33, 31),  # several tiles of rows
        ((0,), 16, 16),
        ((2, 1, 3), 1, 1),  # fewer units than cells: some groups keep nothing
        ((5, 7), 144, 96),  # aligned, several tiles of units
    ],
)
def test_shapes_and_types(leading, n_in, n_out, dtype):
    for dp, keep in ((2, 1), (5, 3), (6, 2)):
        sides = [pattern("interleaved blocks of 8", n, dp, keep) for n in (n_in, n_out)]
        assert_is_the_reference(leading, n_in, n_out, *sides, dtype)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("in_kind", ["none", "interleaved blocks of 8"])
def test_activation_follows_the_scaled_product(activation, in_kind):
    sides = pattern(in_kind, 48, 3, 1), pattern("interleaved shuffled", 40, 3, 1)
    assert_is_the_reference((9,), 48, 40, *sides, scale=0.5, activation=activation)


@pytest.mark.parametrize("out_dp", [None, *range(1, 9)])
@pytest.mark.parametrize("in_dp", [None, *range(1, 9)])
def test_every_pair_of_regular_shared_periods(in_dp, out_dp):
    """Odd sizes, so that nothing is aligned."""
    inside, outside = (None if dp is None else make_pattern(n, dp, 1) for n, dp in ((31, in_dp), (33, out_dp)))
    assert_is_the_reference((7,), 31, 33, inside, outside)


@pytest.mark.parametrize("orders", [1, 4])
def test_a_layer_is_three_launches_whatever_the_groups(orders, monkeypatch):
    """Two packs (weight and bias), one product; backward one unpack for each of them, and one product each."""
    calls = []
    for name in ("pack", "unpack"):
        run = getattr(pack_ops, name)
        monkeypatch.setattr(pack_ops, name, lambda *a, n=name, r=run: (calls.append(n), r(*a))[1])
    sides = [make_pattern(64, 4, 1, interleave=True, shuffle=True, block_size=8, orders=orders) for _ in range(2)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((64, 64), (64,))]
    packed = functional.pack(torch.randn(32, 64), sides[0], "compact").requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = functional.row_linear(packed, *leaves, *sides, backend="triton", leading_shape=(32,))
        assert calls == ["pack", "pack"]
        y.sum().backward()
    assert calls == ["pack", "pack", "unpack", "unpack"]
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counts == {"aten.bmm": 3 * 2 * 32 * 64 * 64 // 16}


def test_multiplies_are_counted():
    sides = [RowPattern(64, 4, 1, interleave=True, order=torch.randperm(8), block_size=8) for _ in range(2)]
    x, weight = torch.randn(32, 64), torch.randn(64, 64, requires_grad=True)
    packed = functional.pack(x, sides[0], "triton").requires_grad_()
    with FlopCounterMode(display=False) as counter:
        functional.row_linear(packed, weight, None, *sides, backend="triton", leading_shape=(32,)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * 64 * 64 // 16


def test_autocast_casts_as_for_a_linear_layer():
    sides = [pattern("interleaved blocks of 8", n, 3, 2) for n in (40, 48)]
    weight, bias = torch.randn(48, 40, requires_grad=True), torch.randn(48, requires_grad=True)
    packed = functional.pack(torch.randn(7, 40), sides[0], "triton").requires_grad_()
    with torch.autocast(torch.get_default_device().type, torch.float16):
        y = functional.row_linear(packed, weight, bias, *sides, backend="triton", leading_shape=(7,))
    assert y.dtype == torch.float16
    y.float().sum().backward()
    assert packed.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


def test_strided_operands_are_read_right():
    inside = pattern("interleaved shuffled", 24, 2, 1)
    x, weight = torch.randn(24, 6).t(), torch.randn(24, 32).t()
    packed = functional.pack(x, inside, "triton")
    y = functional.row_linear(packed, weight, None, inside, backend="triton", leading_shape=(6,))
    torch.testing.assert_close(y, (x * inside.mask(6, device=x.device)) @ weight.t(), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("settings", [{}, {"interleave": False, "shuffle": False, "keep": "one"}])
def test_a_model_learns_as_with_the_reference(settings):
    gradients = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Dropout(0.5),
            torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(96, 5),
        )  # fmt: skip
        report = approximate(model, backend=backend, seed=1, min_gain=0, **settings)
        resample(model)
        model(torch.randn(12, 20)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert_skips(report, everywhere=True)
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)
