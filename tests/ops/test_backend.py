"""The choice of backend, and what happens if Triton is missing or cannot run."""

import subprocess
import sys

import pytest
import torch
from support import ROOT, compiler_environment
from torch._subclasses.fake_tensor import FakeTensorMode

from approxdrop_lightning import RowPattern, TilePattern, functional
from approxdrop_lightning.ops.backend import choose_backend
from approxdrop_lightning.ops.row_linear import compact, reference, row_backend
from approxdrop_lightning.ops.tile_linear import tile_backend


def python(code, environment):
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\n")


def test_names():
    assert row_backend("reference") is reference
    assert row_backend("compact") is compact
    assert row_backend("auto") is compact
    with pytest.raises(ValueError, match="backend must be one of .*'triton', got 'cuda'"):
        row_backend("cuda")


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_auto_takes_triton_for_tiles_of_16_bits_on_cuda(dtype):
    pytest.importorskip("triton")
    with FakeTensorMode():
        x = torch.empty(8, 1024, dtype=dtype, device="cuda")
    expected = "triton_backend" if dtype.itemsize == 2 else "tile_linear.compact"
    assert tile_backend("auto", x).__name__ == f"approxdrop_lightning.ops.{expected}"
    assert choose_backend("auto", tiles_of=torch.empty(8, dtype=dtype)) == "compact"


@pytest.mark.triton
def test_types_that_kernels_do_not_multiply():
    pytest.importorskip("triton")
    x, weight = torch.randn(2, 4).double(), torch.randn(6, 4).double()
    with pytest.raises(ValueError, match="takes float32, float16 and bfloat16, got torch.float64"):
        functional.row_linear(x, weight, None, None, RowPattern(6, 2, 0), backend="triton")


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be one of 'identity', 'relu', 'gelu', got 'tanh'"):
        functional.row_linear(torch.randn(2, 4), torch.randn(6, 4), activation="tanh")


@pytest.mark.parametrize("backend", ["reference", "compact"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activation_of_other_backends(backend, activation):
    x, weight, bias = torch.randn(5, 4), torch.randn(6, 4), torch.randn(6)
    outside = RowPattern(6, 2, 1)
    y = functional.row_linear(x, weight, bias, None, outside, 2.0, backend, activation=activation)
    wanted = getattr(torch.nn.functional, activation)(2 * (x @ weight[1::2].T + bias[1::2]))
    torch.testing.assert_close(y, wanted)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from approxdrop_lightning import RowPattern, TilePattern, functional
x, weight, pattern = torch.randn(3, 8), torch.randn(6, 8), RowPattern(6, 2, 0)
print(tuple(functional.row_linear(x, weight, None, None, pattern).shape))
try:
    functional.row_linear(x, weight, None, None, pattern, backend="triton")
except ImportError as error:
    print(error)
"""


def test_without_triton_all_else_works_and_the_error_says_what_to_install():
    shape, error, _ = python(WITHOUT_TRITON, compiler_environment())
    assert shape == "(3, 3)"
    assert "pip install 'approxdrop-lightning[triton]'" in error


ON_THE_CPU = """
import torch
from approxdrop_lightning import RowPattern, TilePattern, functional
try:
    functional.row_linear(torch.randn(3, 8), torch.randn(6, 8), None, None, RowPattern(6, 2, 0), backend="triton")
except ValueError as error:
    print(error)
"""


@pytest.mark.triton
def test_on_the_cpu_only_in_the_interpreter():
    pytest.importorskip("triton")
    error, _ = python(ON_THE_CPU, compiler_environment())
    assert "TRITON_INTERPRET=1" in error


def test_no_kernel_is_imported_before_it_is_asked_for():
    code = (
        "import sys, approxdrop_lightning; print([m for m in sys.modules if 'approxdrop_lightning.ops.triton' in m])"
    )
    assert python(code, compiler_environment())[0] == "[]"


@pytest.mark.parametrize("backend", ["compact", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize(
    "pattern", [RowPattern(64, 2, 1), RowPattern(64, 2, 1, interleave=True), TilePattern(64, 32, 2, 1, tile_size=16)]
)
def test_operands_may_be_views(backend, pattern):
    """A strided bias, and an expanded gradient (of a sum): compiled code receives only addresses."""
    if backend == "triton":
        pytest.importorskip("triton")
    x, weight, bias = torch.randn(8, 32), torch.randn(64, 32), torch.randn(128)
    results = []
    for name in (backend, "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        if isinstance(pattern, TilePattern):
            y = functional.tile_linear(leaves[0], leaves[1], leaves[2][::2], pattern, backend=name)
        else:
            y = functional.row_linear(leaves[0], leaves[1], leaves[2][::2], None, pattern, backend=name)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
