"""Kernels and operators of tile patterns, in the interpreter, against the masked dense definition."""

import subprocess
import sys

import pytest
import torch
from support import ROOT, TESTS, compiler_environment
from support.triton_cases import TOLERANCE, TYPES
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from approxdrop_lightning import TilePattern, functional
from approxdrop_lightning.ops.tile_linear import tile_ops, triton_tiles
from approxdrop_lightning.ops.triton import common
from approxdrop_lightning.ops.triton.common import tilings
from approxdrop_lightning.ops.triton.launch import Launch

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]


def assert_is_the_reference(rows, n_out, n_in, dp, keep=1, tile_size=16, dtype=torch.float32, bias=True, scale=1.5):
    """Compare output and all gradients with the reference in double precision on the same numbers."""
    pattern = TilePattern(n_out, n_in, dp, int(torch.randint(dp, ())), keep, tile_size)
    shapes = [(rows, n_in), (n_out, n_in), *([(n_out,)] if bias else [])]
    values = [torch.randn(shape).to(dtype) / (8 if i == 1 else 1) for i, shape in enumerate(shapes)]
    direction = torch.randn(rows, n_out).to(dtype)
    found = []
    for backend, exact in (("triton", dtype), ("reference", torch.float64)):
        tensors = [value.to(exact).requires_grad_() for value in values]
        x, weight, b = tensors if bias else (*tensors, None)
        y = functional.tile_linear(x, weight, b, pattern, scale, backend)
        found.append((y, *torch.autograd.grad(y, tensors, direction.to(exact))))
    for name, mine, wanted in zip(("y", "x", "weight", "bias"), *found, strict=False):
        assert mine.dtype == dtype
        message = lambda m, n=name: f"{n} of {rows} rows, {pattern}, {dtype}: {m}"  # noqa: E731
        torch.testing.assert_close(mine.double(), wanted, **TOLERANCE[dtype], msg=message)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("dp", "keep"), [(dp, keep) for dp in range(1, 9) for keep in sorted({1, dp // 2 + 1, dp})])
def test_every_period(dp, keep, dtype):
    """Nine rows and eight columns of tiles, the last ones of one and two units: classes differ in size."""
    assert_is_the_reference(7, 129, 114, dp, keep, 16, dtype)


@pytest.mark.parametrize("n_in", [1, 7, 31, 33, 127, 130])
@pytest.mark.parametrize("n_out", [1, 7, 31, 33, 127, 130])
def test_ragged_shapes(n_out, n_in):
    rows = {1: 1, 7: 33, 31: 2, 33: 31, 127: 16, 130: 130}[n_out]
    assert_is_the_reference(rows, n_out, n_in, 2 + n_in % 3, tile_size=32, bias=n_in != 7)


@pytest.mark.parametrize("tile_size", [1, 8, 24, 64, 128])
def test_tiles_of_any_size(tile_size):
    """Tiles smaller and larger than a step of the sum, and not a power of two."""
    for dp, keep in ((2, 1), (3, 2)):
        assert_is_the_reference(5, 140, 300, dp, keep, tile_size)


def test_no_rows():
    assert_is_the_reference(0, 33, 40, 2)


@pytest.mark.parametrize("number", range(4))
def test_every_choice_of_blocks(number, monkeypatch):
    """All tilings compute the same: blocks larger than a class, and several blocks per class."""
    only = tilings(80, torch.float16)[number]
    monkeypatch.setattr(common, "tilings", lambda *_: (only,))
    pattern = TilePattern(300, 420, 2, 1, 1, 16)
    x, w, y = torch.randn(70, 420).half(), torch.randn(300, 420).half(), torch.empty(70, 300).half()
    dy, dx, dw = torch.randn(70, 300).half(), torch.empty(70, 420).half(), torch.zeros(300, 420).half()
    arguments = (torch.tensor(1, dtype=torch.int32), 2, 1, 16, 1.0)
    triton_tiles.product_launch(x, w, None, y, *arguments).run()
    triton_tiles.product_launch(dy, w.t(), None, dx, *arguments).run()
    launch = triton_tiles.weight_grad_launch(dy, x, dw, *arguments)
    assert [c.kwargs for c in launch.configurations()] == [
        {"BLOCK_N": only[0], "BLOCK_K": only[1], "BLOCK_M": only[2]}
    ]
    launch.run()
    mask, exact = pattern.mask(w.device), torch.float32
    masked = w.to(exact) * mask
    for found, expected in (
        (y, x.to(exact) @ masked.T),
        (dx, dy.to(exact) @ masked),
        (dw, dy.to(exact).T @ x.to(exact) * mask),
    ):
        torch.testing.assert_close(found.to(exact), expected, rtol=1e-2, atol=5e-2)


def test_operands_that_are_not_contiguous():
    pattern = TilePattern(33, 40, 2, 1, tile_size=16)
    x, weight = torch.randn(40, 9).t(), torch.randn(40, 33).t()
    found = functional.tile_linear(x, weight, None, pattern, backend="triton")
    torch.testing.assert_close(found, x @ (weight * pattern.mask(x.device)).T, rtol=1e-4, atol=1e-4)
    grad = tile_ops._weight_grad(torch.ones(()).expand(9, 33), x, torch.tensor(1, dtype=torch.int32), 2, 1, 16, 1.0)
    torch.testing.assert_close(grad, torch.ones(33, 9) @ x * pattern.mask(x.device), rtol=1e-4, atol=1e-4)


def operands():
    return (
        torch.randn(5, 40),
        torch.randn(33, 40),
        torch.randn(33),
        torch.tensor(1, dtype=torch.int32),
        3,
        2,
        16,
        2.0,
    )


def test_operators_keep_their_promises():
    x, weight, bias, offset, *pattern = operands()
    dy = torch.randn(5, 33)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(tile_ops._tile_linear.op, (*leaves, offset, *pattern))
    torch.library.opcheck(tile_ops._input_grad.op, (dy, weight, offset, *pattern))
    torch.library.opcheck(tile_ops._weight_grad.op, (dy, x, offset, *pattern))


def test_compiled_models_do_not_compile_anew_for_another_pattern():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    x, weight, bias, _, *_ = operands()

    @torch.compile(backend=graphs, dynamic=True, fullgraph=True)
    def compiled(offset, dp):
        return tile_ops._tile_linear(x, weight, bias, offset, dp, 1, 16, 1.0)

    for dp, offset in ((2, 0), (3, 2), (5, 4), (7, 1), (4, 3)):
        found = compiled(torch.tensor(offset, dtype=torch.int32), dp)
        expected = functional.tile_linear(x, weight, bias, TilePattern(33, 40, dp, offset, 1, 16))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1


def test_a_pattern_is_changed_in_place():
    """As in the replay of a captured graph."""
    x, weight, bias, _, dp, keep, tile_size, scale = operands()
    offset = torch.tensor(0, dtype=torch.int32)
    for number in range(dp):
        offset.fill_(number)
        found = tile_ops._tile_linear(x, weight, bias, offset, dp, keep, tile_size, scale)
        pattern = TilePattern(33, 40, dp, number, keep, tile_size)
        expected = functional.tile_linear(x, weight, bias, pattern, scale, "reference")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_operations_of_kept_tiles_are_counted():
    x, weight = torch.randn(5, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = functional.tile_linear(x, weight, None, TilePattern(64, 64, 4, 1, tile_size=16), backend="triton")
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 64 * 64 // 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_the_type_of_the_user(dtype, monkeypatch):
    """Checks the cast at the launch, since the interpreter does not support bfloat16."""
    x, weight, bias, offset, *pattern = operands()
    seen = []
    monkeypatch.setattr(Launch, "run", lambda launch: seen.append(launch.arguments["x"].dtype))
    with torch.autocast(torch.get_default_device().type, dtype):
        y = tile_ops._tile_linear(x, weight, bias, offset, *pattern)
    assert y.dtype == dtype
    assert seen == [dtype]


def test_types_without_kernels_are_refused():
    pattern = TilePattern(33, 40, 2, 0)
    with pytest.raises(ValueError, match="float32, float16 and bfloat16, got torch.float64"):
        functional.tile_linear(
            torch.randn(5, 40).double(), torch.randn(33, 40).double(), None, pattern, 1.0, "triton"
        )


COMPILATIONS = """
import torch
from support.triton_cases import compilations
from approxdrop_lightning.ops.tile_linear.triton_tiles import product_launch, weight_grad_launch

launches = []
shapes = (256, 1024), (2048, 1024), (256, 2048)
x, w, y = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes)
offset = torch.empty((), dtype=torch.int32, device="meta")
for dp in range(1, 18):
    for keep in range(1, dp + 1):
        pattern = (offset, dp, keep, 32, 2.0)
        launches.append(product_launch(x, w, None, y, *pattern))
        launches.append(product_launch(y, w.t(), None, x, *pattern))
        launches.append(weight_grad_launch(y, x, w, *pattern))
print(compilations(launches))
"""


def test_another_pattern_compiles_nothing():
    """One specialization of each kernel for all periods and offsets of a layer, by Triton's own rules."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILATIONS],
        env=compiler_environment() | {"PYTHONPATH": f"{ROOT}:{TESTS}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 3  # forward, gradient of the input, gradient of the weight
