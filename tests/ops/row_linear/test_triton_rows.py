"""Kernels and operators of regular shared patterns, in the interpreter, against the masked dense definition."""

import subprocess
import sys
from itertools import product

import pytest
import torch
from support import ROOT, compiler_environment
from support.triton_cases import TOLERANCE, TYPES, assert_is_the_reference
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from approxdrop_lightning import RowPattern, functional
from approxdrop_lightning.ops.row_linear import row_ops, triton_rows
from approxdrop_lightning.ops.row_linear.triton_rows import Kept
from approxdrop_lightning.ops.triton.common import tilings

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]
#: Small tiles: several of them in each direction, the last ones ragged.
TILING = tilings(80, torch.float32)[0]._replace(rows=32, columns=32, depth=16)


def pattern(n, dp):
    return None if dp is None else RowPattern(n, dp, int(torch.randint(dp, ())))


@pytest.mark.parametrize("out_dp", [None, *range(1, 9)])
@pytest.mark.parametrize("in_dp", [None, *range(1, 9)])
def test_every_pair_of_periods(in_dp, out_dp):
    """Odd sizes, so that nothing is aligned; in one pair of eight also 127 and 130 units."""
    n_in, n_out = (127, 130) if in_dp == out_dp else (31, 33)
    assert_is_the_reference((7,), n_in, n_out, pattern(n_in, in_dp), pattern(n_out, out_dp))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("leading", "n_in", "n_out"), [((1,), 1, 1), ((3, 11), 64, 96), ((130,), 33, 7), ((0,), 8, 8)]
)
def test_shapes_and_types(leading, n_in, n_out, dtype):
    for in_dp, out_dp in ((None, 2), (2, None), (2, 3), (9, 9)):  # 9: more than units, so that some keep nothing
        assert_is_the_reference(
            leading, n_in, n_out, pattern(n_in, in_dp), pattern(n_out, out_dp), dtype, bias=in_dp != 2
        )


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activation_follows_the_scaled_product(activation):
    assert_is_the_reference((33,), 48, 40, pattern(48, 2), pattern(40, 3), scale=0.5, activation=activation)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize(("in_dp", "out_dp"), [(1, 1), (1, 3), (2, 1), (4, 2)])
def test_operands_by_descriptor(in_dp, out_dp, forward):
    inside, outside = Kept(128, in_dp, in_dp - 1), Kept(96, out_dp, 0)
    weight, bias = torch.randn(96, 128), torch.randn(96)
    kept = weight[outside.offset :: out_dp, inside.offset :: in_dp]
    x = torch.randn(33, inside.count if forward else outside.count)
    packed = weight
    if in_dp > 1:
        packed = weight.new_empty(triton_rows.packed_shape(inside, outside))
        triton_rows.pack_launch(weight, packed, inside, outside).run()
    y = x.new_empty(33, outside.count if forward else inside.count)
    launch = triton_rows.product_launch(
        x, packed, bias if forward else None, y, None, inside, outside, 2.0, TILING,
        forward=forward, descriptors=True,
    )  # fmt: skip
    assert launch.constants["DESCRIPTORS"]
    launch.run()
    wanted = 2 * (x @ kept.T + bias[outside.offset :: out_dp]) if forward else 2 * (x @ kept)
    torch.testing.assert_close(y, wanted, **TOLERANCE[torch.float32])


def test_weight_gradient_by_descriptor():
    inside, outside = Kept(128, 2, 1), Kept(96, 3, 2)
    dy, x, dw = torch.randn(33, 32), torch.randn(33, 64), torch.zeros(96, 128)
    launch = triton_rows.weight_grad_launch(dy, x, dw, inside, outside, 2.0, TILING, descriptors=True)
    assert launch.constants["DESCRIPTORS"]
    launch.run()
    torch.testing.assert_close(dw[2::3, 1::2], 2 * dy.T @ x, **TOLERANCE[torch.float32])
    dw[2::3, 1::2] = 0
    assert not dw.any()


@pytest.mark.parametrize(("in_features", "itemsize_fits"), [(130, False), (128, True)])
def test_unaligned_rows_come_by_pointer(in_features, itemsize_fits):
    weight, y = torch.randn(64, in_features), torch.empty(8, 32)
    launch = triton_rows.product_launch(
        torch.randn(8, in_features), weight, None, y, None, Kept(in_features, 1, 0), Kept(64, 2, 0), 1.0, TILING,
        descriptors=True,
    )  # fmt: skip
    assert launch.constants["DESCRIPTORS"] is itemsize_fits


def arguments(in_dp=2, out_dp=3, bias=True):
    inside = Kept(32, in_dp, in_dp - 1)
    x, weight = torch.randn(6, inside.count, requires_grad=True), torch.randn(40, 32, requires_grad=True)
    b = torch.randn(40, requires_grad=True) if bias else None
    return x, weight, b, in_dp, in_dp - 1, out_dp, 0, 1.5


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
@pytest.mark.parametrize(("in_dp", "out_dp", "bias"), [(2, 3, True), (1, 2, False), (3, 1, True)])
def test_opcheck(in_dp, out_dp, bias, activation):
    torch.library.opcheck(row_ops.rows_linear.op, (*arguments(in_dp, out_dp, bias), activation))


def test_opcheck_of_the_gradients():
    dy, x, packed = torch.randn(6, 14), torch.randn(6, 16), torch.randn(14, 16)
    torch.library.opcheck(row_ops.rows_input_grad.op, (dy, packed, 40, 32, 2, 1, 3, 0, 1.5))
    torch.library.opcheck(row_ops.rows_weight_grad.op, (dy, x, 40, 32, 2, 1, 3, 0, 1.5))


def test_multiplies_are_counted():
    x, weight = torch.randn(32, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        packed = functional.pack(x, RowPattern(64, 2, 1), "triton")
        y = functional.row_linear(packed, weight, None, RowPattern(64, 2, 1), RowPattern(48, 3, 0), backend="triton")
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * 32 * 16


def test_autocast_casts_as_for_a_linear_layer():
    x, weight, b, *rest = arguments()
    with torch.autocast(torch.get_default_device().type, torch.float16):
        y = row_ops.rows_linear(x, weight, b, *rest, "identity")[0]
    assert y.dtype == torch.float16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == b.grad.dtype == torch.float32


def test_gradient_in_another_order_of_memory():
    x, weight, b, *rest = arguments()
    direction = torch.randn(14, 6).t()
    for activation in ("identity", "relu", "gelu"):
        y = row_ops.rows_linear(x, weight, b, *rest, activation)[0]
        mine = torch.autograd.grad(y, (x, weight, b), direction)
        y = row_ops.rows_linear(x, weight, b, *rest, activation)[0]
        for a, c in zip(mine, torch.autograd.grad(y, (x, weight, b), direction.contiguous()), strict=True):
            torch.testing.assert_close(a, c)


def test_one_graph_for_all_periods_and_offsets():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight = torch.randn(40, 32, requires_grad=True)

    @torch.compile(backend=counter, dynamic=True, fullgraph=True)
    def compiled(x, weight, in_dp, in_offset, out_dp, out_offset):
        return row_ops.rows_linear(x, weight, None, in_dp, in_offset, out_dp, out_offset, 1.5, "relu")[0] * 2

    for in_dp, out_dp in product((2, 3, 5, 8), repeat=2):
        for in_offset in (0, in_dp - 1):
            x = torch.randn(6, Kept(32, in_dp, in_offset).count)
            y = compiled(x, weight, in_dp, in_offset, out_dp, out_dp - 1)
            wanted = 3 * x @ weight[out_dp - 1 :: out_dp, in_offset::in_dp].T
            torch.testing.assert_close(y, wanted.relu(), **TOLERANCE[torch.float32])
    # 0 and 1 are special to the tracer: an offset of 0, and of 1 as in (dp, offset) = (2, 1), each have their own.
    assert counter.frame_count <= 4


COMPILATIONS = """
import torch
from support.triton_cases import compilations
from approxdrop_lightning.ops.row_linear import triton_rows
from approxdrop_lightning.ops.triton.common import tilings
from approxdrop_lightning.ops.row_linear.triton_rows import Kept

tiling = tilings(90, torch.float16)[0]
weight = torch.empty(2048, 2048, dtype=torch.float16, device="meta")
for descriptors in (False, True):
    counts = []
    for in_periods in ([1], (2, 3, 8, 16)):  # without and with columns packed
        forward, backward, gradient, packs = [], [], [], []
        for in_dp in in_periods:
            for out_dp in (1, 2, 3, 8, 16, 17):
                for offset in {0, out_dp - 1}:
                    inside, outside = Kept(2048, in_dp, in_dp - 1), Kept(2048, out_dp, offset)
                    x, y = weight.new_empty(256, inside.count), weight.new_empty(256, outside.count)
                    packed = weight
                    if in_dp > 1:
                        packed = weight.new_empty(triton_rows.packed_shape(inside, outside))
                        packs.append(triton_rows.pack_launch(weight, packed, inside, outside))
                    sides = (inside, outside, 2.0, tiling)
                    options = {"descriptors": descriptors}
                    forward.append(triton_rows.product_launch(x, packed, weight[0], y, None, *sides, **options))
                    backward.append(
                        triton_rows.product_launch(y, packed, None, x, None, *sides, forward=False, **options)
                    )
                    gradient.append(triton_rows.weight_grad_launch(y, x, weight, *sides, **options))
        counts.append([compilations(launches) for launches in (forward, backward, gradient, packs)])
    print(counts)
"""


def test_no_compilation_for_another_period_or_offset():
    """Only whether rows of the operands are aligned to 16 bytes, of the one that varies or of both, makes kernels."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILATIONS], env=compiler_environment() | {"PYTHONPATH": "tests:."},
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    for line in result.stdout.splitlines():
        out_only, both = eval(line)
        assert out_only == [2, 2, 2, 0]
        assert both[3] == 1
        assert all(count <= 4 for count in both[:3])
