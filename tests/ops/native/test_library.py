"""The compiled kernels: optional, without side effects, with the struct layouts that Python expects."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import ROOT
from support.kernels import needs_compiler

from approxdrop_lightning.ops.lstm import compact as lstm
from approxdrop_lightning.ops.native import library as native
from approxdrop_lightning.ops.native import product
from approxdrop_lightning.ops.native.product import ProductStruct, Submatrix
from approxdrop_lightning.ops.row_linear import one_pass
from approxdrop_lightning.ops.row_linear.groups import GroupedStruct
from approxdrop_lightning.ops.row_linear.one_pass import LayerStruct, OperandStruct, linear_between
from approxdrop_lightning.patterns.cells import PatternStruct
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.units import UnitsStruct

TRAIN = """
import torch
from approxdrop_lightning import approximate, resample
from approxdrop_lightning.ops.native.library import library
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 2))
approximate(model, seed=0, min_gain=0)
resample(model)
print(library() is not None, float(model(torch.ones(4, 8)).square().sum().detach()))
"""


def train(cache, **environment):
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)} | environment
    run = subprocess.run(
        [sys.executable, "-c", TRAIN], env=environment,
        capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    compiled, value = run.stdout.split()
    return compiled == "True", float(value)


@needs_compiler
def test_compiled_once_and_done_without_where_there_is_no_compiler(tmp_path):
    compiled, value = train(tmp_path)
    assert compiled
    (library,) = (tmp_path / "approxdrop_lightning").iterdir()  # and no partial file next to it
    made = library.stat().st_mtime_ns
    with ThreadPoolExecutor(2) as pool:  # each is a process
        again = pool.submit(train, tmp_path)
        without = [
            pool.submit(train, tmp_path, PATH=""),
            pool.submit(train, tmp_path, APPROXDROP_NATIVE="0"),
        ]
    assert [run.result() for run in without] == [(False, pytest.approx(value, rel=1e-5))] * 2
    again.result()
    assert library.stat().st_mtime_ns == made


@needs_compiler
def test_the_sources_compile():
    assert native.library() is not None


@needs_compiler
@pytest.mark.parametrize(
    "struct", [UnitsStruct, ProductStruct, PatternStruct, GroupedStruct, LayerStruct, OperandStruct]
)
def test_structures_are_as_large_as_those_of_the_sources(struct):
    name = struct.__name__.removesuffix("Struct")
    assert ctypes.c_int64.in_dll(native.library(), f"sizeof_{name}").value == ctypes.sizeof(struct)


@needs_compiler
def test_panels_are_as_wide_as_those_of_the_sources():
    assert ctypes.c_int64.in_dll(native.library(), "one_pass_panel").value == one_pass.PANEL


@needs_compiler
def test_lack_of_memory_is_an_error_of_python():
    """More rows than the address space holds: nothing is read before memory is allocated."""
    compiled = native.library()
    huge = ProductStruct()
    huge.a.rows.count, huge.a.columns.count, huge.b.columns.count = 2**57, 1, 1
    with pytest.raises(MemoryError, match="products"):
        compiled.products(ctypes.byref(huge), 1, 1)
    many = ctypes.byref(GroupedStruct(groups=2**50))
    for name in ("grouped_product", "grouped_input_grad", "grouped_weight_grad"):
        with pytest.raises(MemoryError, match=name):
            more = [None, None, 1.0, 0] if name == "grouped_product" else [None]
            getattr(compiled, name)(many, *[None, 0, 0] * 2, *more, 1)
    rows = ctypes.c_int64(2**57)
    layer = LayerStruct(first_row=ctypes.addressof(rows))
    for name, *more in (("one_pass_product",), ("one_pass_weight_grad", 0)):
        with pytest.raises(MemoryError, match=name):
            getattr(compiled, name)(ctypes.byref(layer), 1, *more)
    with pytest.raises(MemoryError, match="lstm_forward"):
        compiled.lstm_forward(*[None] * 7, 1, 2**50, 8, 8, 1)
    with pytest.raises(MemoryError, match="lstm_backward"):
        compiled.lstm_backward(*[None] * 9, 1, 2**50, 8, 8, 1)


@needs_compiler
def test_lack_of_memory_for_a_threads_blocks_is_an_error_of_python(tmp_path, monkeypatch):
    """The library is linked with an allocator that always fails."""
    none = tmp_path / "none.c"
    none.write_text("#include <stddef.h>\nvoid *aligned_alloc(size_t alignment, size_t size) { return NULL; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_SOURCES", [*native._SOURCES, none])
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-Wl,-Bsymbolic"))
    compiled = native.library.__wrapped__()
    monkeypatch.setattr(product, "library", lambda: compiled)
    a, b, out = torch.randn(200, 50), torch.randn(50, 60), torch.empty(200, 60)
    with pytest.raises(MemoryError, match="products"):
        product.multiply([(Submatrix.whole(a), Submatrix.whole(b), Submatrix.whole(out), False)])
    pattern = RowPattern(64, 2, 0, interleave=True, block_size=16)
    layer = linear_between(pattern, None, (200,), torch.randn(50, 64))
    x, y = layer.inputs.new(a), torch.randn(200, 50)
    with pytest.raises(MemoryError, match="one_pass_product"):
        layer.product(x, torch.randn(50, 64), None)
    with pytest.raises(MemoryError, match="one_pass_product"):
        layer.input_grad(y, torch.randn(50, 64))
    with pytest.raises(MemoryError, match="one_pass_weight_grad"):
        layer.weight_grad(y, x)


@needs_compiler
def test_the_wider_tile_of_other_processors(tmp_path, monkeypatch):
    """The AVX-512 code path, which the compiler emulates with this processor's instructions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-DLANES=16", "-DROWS=12"))
    wide = native.library.__wrapped__()
    assert wide is not None
    for module in (product, lstm):
        monkeypatch.setattr(module, "library", lambda: wide)
    for m, k, n in ((1, 5, 3), (45, 67, 50), (301, 907, 120)):
        a, b, out = torch.randn(m, k), torch.randn(n, k), torch.empty(m, n)
        product.multiply([(Submatrix.whole(a), Submatrix.whole(b).t, Submatrix.whole(out), False)])
        torch.testing.assert_close(out, a @ b.t(), rtol=1e-4, atol=1e-3)
    hidden, kept = 50, torch.randperm(50)[:17]
    inputs = [torch.randn(s, requires_grad=True) for s in ((3, 20, 200), (20, hidden), (20, hidden), (200, 17))]
    results = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(lstm, "library", lambda: None)
        out = lstm.sequence(*inputs, kept)
        results.append([*out, *torch.autograd.grad(out[0].square().sum(), inputs)])
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-3, atol=1e-3)


@needs_compiler
def test_tiny_numbers_keep_their_values():
    """-ffast-math would flush them to zero in the whole process."""
    native.library()
    assert (torch.tensor(1e-40) * 1.0).item() > 0
