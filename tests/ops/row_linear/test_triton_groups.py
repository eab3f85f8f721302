"""Grouped kernels and their operators, in the interpreter, against the masked dense definition."""

import subprocess
import sys
from itertools import product

import pytest
import torch
from support import ROOT, compiler_environment
from support.triton_cases import TOLERANCE, TYPES, assert_is_the_reference, make_pattern
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from approxdrop_lightning import RowPattern, approximate, functional, resample
from approxdrop_lightning.ops.row_linear import group_ops
from approxdrop_lightning.ops.row_linear.tables import make_plan

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
    for orders, (n_in, n_out), leading in ((2, (96, 80), (3, 5)), (3, (41, 36), (30,)), (2, (64, 64), (1,))):
        kind = {"interleave": True, "shuffle": True, "block_size": 8, "orders": orders}
        inside, outside = (make_pattern(n, dp, keep, **kind) for n in (n_in, n_out))
        assert_is_the_reference(
            leading, n_in, n_out, None if sides == "out" else inside, None if sides == "in" else outside
        )


@pytest.mark.parametrize("dp", range(1, 9))
def test_every_period_and_number_of_kept_cells(dp):
    for keep in sorted({1, max(dp // 2, 1), dp // 2 + 1, dp}):  # up to half of the cells, beyond, all
        sides = [pattern("interleaved blocks of 8", n, dp, keep) for n in (130, 127)]
        assert_is_the_reference((2, 9), 130, 127, *sides, bias=keep != 2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("leading", "n_in", "n_out"),
    [
        ((1,), 64, 64),  # less rows than groups
        ((130,), 33, 31),  # several tiles of rows
        ((0,), 16, 16),
        ((2, 1, 3), 1, 1),  # less units than cells: some groups keep nothing
        ((5, 7), 256, 160),  # aligned, several tiles of units
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


@pytest.mark.parametrize(("in_kind", "out_kind"), list(product(KINDS, KINDS)))
@pytest.mark.parametrize(("dp", "keep"), [(3, 1), (3, 2), (5, 4), (5, 2)])
def test_blocks_of_the_weight_are_disjoint_and_all_that_is_kept(in_kind, out_kind, dp, keep):
    """So each entry of the weight's gradient is written once, by one program, without atomics."""
    torch.set_default_device("cpu")
    inside, outside = pattern(in_kind, 48, dp, keep), pattern(out_kind, 40, dp, keep)
    plan = make_plan(inside, outside, (7,), torch.empty(40, 48))
    groups = range(plan.sizes.groups)
    kept = [torch.zeros(40, 48, dtype=torch.int64) for _ in groups]
    masks = [torch.ones(plan.sizes.groups, n) if p is None else p.mask(plan.sizes.groups)
             for p, n in ((inside, 48), (outside, 40))]  # fmt: skip
    for g in groups:
        kept[g] += torch.outer(masks[1][g].long(), masks[0][g].long())
    units = [
        torch.arange(n) if run == 0 else (starts[:, None] + torch.arange(run)).view(-1)
        for n, run, starts in (
            (48, plan.sizes.in_run, plan.tables.in_units), (40, plan.sizes.out_run, plan.tables.out_units),
        )
    ]  # fmt: skip
    written = torch.zeros(40, 48, dtype=torch.int64)
    found = [torch.zeros(40, 48, dtype=torch.int64) for _ in groups]
    for n_first, n, k_first, k, first, last in plan.tables.pairs.view(-1, 6).tolist():
        block = units[1][n_first : n_first + n, None], units[0][None, k_first : k_first + k]
        written[block] += 1
        for g in range(first, last):
            found[g][block] += 1
    assert written.max() <= 1
    for g in groups:
        assert torch.equal(found[g], kept[g])


def plan_and_arguments(dp=3, keep=2, n_in=40, n_out=48, kind="interleaved blocks of 8", dtype=torch.float32):
    weight = torch.randn(n_out, n_in).to(dtype).requires_grad_()
    plan = make_plan(pattern(kind, n_in, dp, keep), pattern(kind, n_out, dp, keep), (7,), weight)
    x = torch.randn(plan.in_shape).to(dtype).requires_grad_()
    return plan, x, weight, torch.randn(n_out).to(dtype).requires_grad_()


@pytest.mark.parametrize("kind", ["interleaved blocks of 8", "interleaved shuffled"])
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_opcheck(kind, activation):
    plan, x, weight, bias = plan_and_arguments(kind=kind)
    torch.library.opcheck(group_ops.groups_linear.op, (x, weight, bias, *plan[:4], 1.5, activation))


def test_opcheck_of_the_gradients_and_copies():
    plan, x, weight, _ = plan_and_arguments()
    x, weight, dy = x.detach(), weight.detach(), torch.randn(plan.out_shape)
    tables, sizes = plan.tables, plan.sizes
    torch.library.opcheck(group_ops.groups_input_grad.op, (dy, weight, tables, sizes, plan.in_shape, 1.5))
    torch.library.opcheck(group_ops.groups_weight_grad.op, (dy, x, tables, sizes, 48, 40, 1.5))
    torch.library.opcheck(group_ops.groups_bias_grad.op, (dy, tables, sizes, 48, 1.5))
    dense = torch.randn(7, 40, requires_grad=True)
    torch.library.opcheck(group_ops.gather.op, (dense, tables, sizes, plan.in_shape))
    torch.library.opcheck(group_ops.scatter.op, (x.requires_grad_(), tables, sizes, 40))


def test_multiplies_are_counted():
    sides = [RowPattern(64, 4, 1, interleave=True, order=torch.randperm(8), block_size=8) for _ in range(2)]
    x, weight = torch.randn(32, 64), torch.randn(64, 64, requires_grad=True)
    packed = functional.pack(x, sides[0], "triton").requires_grad_()
    with FlopCounterMode(display=False) as counter:
        functional.row_linear(packed, weight, None, *sides, backend="triton", leading_shape=(32,)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 32 * 64 * 64 // 16


def test_autocast_casts_as_for_a_linear_layer():
    plan, x, weight, bias = plan_and_arguments()
    with torch.autocast(torch.get_default_device().type, torch.float16):
        y = group_ops.groups_linear(x, weight, bias, *plan[:4], 1.5, "relu")[0]
    assert y.dtype == torch.float16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


def test_strided_operands_are_read_right():
    inside = pattern("interleaved shuffled", 24, 2, 1)
    x, weight = torch.randn(24, 6).t(), torch.randn(24, 32).t()
    packed = functional.pack(x, inside, "triton")
    y = functional.row_linear(packed, weight, None, inside, backend="triton", leading_shape=(6,))
    torch.testing.assert_close(y, (x * inside.mask(6, device=x.device)) @ weight.t(), **TOLERANCE[torch.float32])


def test_one_graph_for_all_patterns_of_a_period():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight, bias = torch.randn(48, 32, requires_grad=True), torch.randn(48, requires_grad=True)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(x, weight, bias, tables, sizes, in_shape, out_shape):
        return group_ops.groups_linear(x, weight, bias, tables, sizes, in_shape, out_shape, 1.0, "relu")[0] * 2

    for _ in range(6):
        sides = [pattern("interleaved blocks of 8", n, 2, 1) for n in (32, 48)]
        plan = make_plan(*sides, (6,), weight)
        x = torch.randn(6, 32)
        packed = functional.pack(x, sides[0]).view(plan.in_shape).requires_grad_()
        y = compiled(packed, weight, bias, *map(tuple, plan[:2]), plan.in_shape, plan.out_shape)
        wanted = 2 * functional.pack(((x * sides[0].mask(6, device=x.device)) @ weight.t() + bias).relu(), sides[1])
        torch.testing.assert_close(y, wanted, **TOLERANCE[torch.float32])
        y.sum().backward()
    assert counter.frame_count == 1


def test_a_plan_takes_another_pattern_in_place():
    """As in a CUDA graph: the captured launch reads the memory of the tables, wherever the pattern came from."""
    patterns = [[pattern("interleaved blocks of 8", n, 2, 1) for n in (32, 48)] for _ in range(2)]
    weight, x = torch.randn(48, 32), torch.randn(6, 32)
    first, second = (make_plan(*sides, (6,), weight) for sides in patterns)
    assert first.sizes == second.sizes
    assert (first.in_shape, first.out_shape) == (second.in_shape, second.out_shape)
    first.flat.copy_(second.flat)
    packed = functional.pack(x, patterns[1][0]).view(first.in_shape)
    y = group_ops.groups_linear(packed, weight, None, *first[:4], 1.0, "identity")[0]
    wanted = functional.pack((x * patterns[1][0].mask(6, device=x.device)) @ weight.t(), patterns[1][1])
    torch.testing.assert_close(y, wanted, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("settings", [{}, {"interleave": False, "shuffle": False, "keep": "one"}])
def test_a_model_learns_as_with_the_reference(settings):
    gradients = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Dropout(0.5),
            torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(96, 5),
        )  # fmt: skip
        approximate(model, backend=backend, seed=1, **settings)
        resample(model)
        model(torch.randn(12, 20)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)


COMPILATIONS = """
import torch
from approxdrop_lightning import RowPattern
from approxdrop_lightning.ops.row_linear import group_launches
from approxdrop_lightning.ops.row_linear.tables import make_plan
from approxdrop_lightning.ops.triton.common import tilings
from support.triton_cases import compilations, make_pattern

tiling = tilings(90, torch.float16)[0]
n, narrow = 16 * 16 * 15 * 7, 8 * 3 * 5 * 7
weight, small = (torch.empty(m, m, dtype=torch.float16, device="meta") for m in (n, narrow))
launches = {}
for dp in range(2, 9):
    for keep in range(1, dp):
        inside, outside = (
            make_pattern(n, dp, keep, interleave=True, shuffle=True, block_size=16) for _ in range(2)
        )
        tables, sizes, in_shape, out_shape, _ = make_plan(inside, outside, (256,), weight)
        x, y, dense = (weight.new_empty(shape) for shape in (in_shape, out_shape, (256, n)))
        common = tables, sizes, 2.0, tiling
        for name, launch in {
            "forward": group_launches.product_launch(x, weight, weight[0], y, None, *common),
            "input": group_launches.product_launch(y, weight, None, x, None, *common, forward=False),
            "weight": group_launches.weight_grad_launch(y, x, weight, *common),
            "bias": group_launches.bias_grad_launch(y, weight[0], tables, sizes, 2.0),
            "gather": group_launches.copy_launch(dense, x, tables, sizes, gather=True),
        }.items():
            launches.setdefault(name, []).append(launch)
        single = [make_pattern(narrow, dp, keep, interleave=True, shuffle=True) for _ in range(2)]
        tables, sizes, *_ = make_plan(*single, (256,), small)
        assert group_launches.packs(sizes)
        packed = weight.new_empty(group_launches.packed_shape(sizes))
        launches.setdefault("pack", []).append(group_launches.pack_launch(small, packed, tables, sizes))
print([compilations(group) for group in launches.values()])
"""


def test_no_compilation_for_another_pattern():
    """Whatever dp, keep, offset and order are."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILATIONS], env=compiler_environment() | {"PYTHONPATH": "tests:."},
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert result.stdout.split("\n")[0] == "[1, 1, 1, 1, 1, 1]"
