"""The compiled kernels: found or done without, right to the last places of single precision, harmless to others."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import ROOT

from approxdrop_lightning.ops.lstm import compact as lstm
from approxdrop_lightning.ops.native import buffers, copies, product
from approxdrop_lightning.ops.native import library as native
from approxdrop_lightning.ops.native.product import ProductStruct, Submatrix
from approxdrop_lightning.ops.row_linear import one_pass
from approxdrop_lightning.ops.row_linear.groups import RowGroupStruct
from approxdrop_lightning.ops.row_linear.one_pass import LayerStruct, linear_between
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.units import Units, UnitsStruct

# Where there is a compiler, sources that do not compile are a failure.
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)
TRAIN = """
import torch
from approxdrop_lightning import approximate, resample
from approxdrop_lightning.ops.native.library import library
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 2))
approximate(model, seed=0)
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
def test_compiled_once_and_done_without_where_there_is_no_compiler_or_cache(tmp_path):
    compiled, value = train(tmp_path)
    assert compiled
    (library,) = (tmp_path / "approxdrop_lightning").iterdir()  # and nothing half-written beside it
    made = library.stat().st_mtime_ns
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with ThreadPoolExecutor(2) as pool:  # each is a process
        again = pool.submit(train, tmp_path)
        without = [
            pool.submit(train, tmp_path, PATH=""),
            pool.submit(train, tmp_path, APPROXDROP_NATIVE="0"),
            pool.submit(train, blocked),
        ]
    assert [run.result() for run in without] == [(False, pytest.approx(value, rel=1e-5))] * 3
    again.result()
    assert library.stat().st_mtime_ns == made
    library.write_bytes(b"damaged")
    assert train(tmp_path) == (False, pytest.approx(value, rel=1e-5))


@needs_compiler
def test_an_lstm_step_at_the_ends_of_the_range(monkeypatch):
    """Errors of exp are below 3e-7 of the result; saturated gates, zeros, infinities and NaN as PyTorch has them."""
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-8, -1e-4, 1e30, -1e30])])
    special = torch.tensor([float("inf"), -float("inf"), float("nan")])
    gates = torch.cat([values, special]).repeat(4)[None, None]
    hidden = gates.shape[2] // 4
    state = torch.zeros(1, hidden), torch.linspace(-2, 2, hidden)[None]
    weight, kept = torch.zeros(4 * hidden, 1), torch.tensor([0])
    results = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(lstm, "library", lambda: None)
        inputs = [x.clone().requires_grad_() for x in (gates, *state)]
        out = lstm.sequence(*inputs, weight, kept)
        results.append([*out, *torch.autograd.grad(out, inputs, [torch.ones_like(x) for x in out])])
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=2e-6, atol=5e-7, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "depth"), [(1, 1, 1, 1), (3, 20, 50, 17), (2, 7, 33, 33), (2, 3, 520, 260)]
)
def test_the_recurrence_is_that_of_pytorch(steps, batch, hidden, depth, threads, monkeypatch):
    """Over bands and panels that are not full, several depths (4 * 520 > 1024), and gathered inputs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    kept = None if depth == hidden else torch.randperm(hidden)[:depth]
    inputs = [torch.randn(s) for s in ((steps, batch, 4 * hidden), (batch, hidden), (batch, hidden))]
    inputs.append(torch.randn(4 * hidden, depth) / depth**0.5)
    results = []
    try:
        for compiled in (True, False):
            if not compiled:
                monkeypatch.setattr(lstm, "library", lambda: None)
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = lstm.sequence(*leaves, kept)
            grads = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in out]
            results.append([*out, *torch.autograd.grad(out, leaves, grads)])
    finally:
        torch.set_num_threads(before)
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_the_sources_compile():
    assert native.library() is not None


@needs_compiler
@pytest.mark.parametrize("struct", [UnitsStruct, ProductStruct, RowGroupStruct, LayerStruct])
def test_structures_are_as_large_as_those_of_the_sources(struct):
    name = struct.__name__.removesuffix("Struct")
    assert ctypes.c_int64.in_dll(native.library(), f"sizeof_{name}").value == ctypes.sizeof(struct)


@needs_compiler
def test_panels_are_as_wide_as_those_of_the_sources():
    assert ctypes.c_int64.in_dll(native.library(), "one_pass_panel").value == one_pass.PANEL


@needs_compiler
def test_lack_of_memory_is_an_error_of_python():
    """More rows than the machine has addresses: nothing is read before the memory is there."""
    compiled = native.library()
    huge = ProductStruct()
    huge.a.rows.count, huge.a.columns.count, huge.b.columns.count = 2**57, 1, 1
    with pytest.raises(MemoryError, match="products"):
        compiled.products(ctypes.byref(huge), 1, 1)
    none = ctypes.c_int64(0)
    layer = LayerStruct(rows=2**57, inputs=1, outputs=1, first_panel=ctypes.addressof(none))
    for name in ("one_pass_product", "one_pass_input_grad", "one_pass_weight_grad"):
        with pytest.raises(MemoryError, match=name):
            getattr(compiled, name)(ctypes.byref(layer), 1)
    with pytest.raises(MemoryError, match="lstm_forward"):
        compiled.lstm_forward(*[None] * 7, 1, 2**50, 8, 8, 1)
    with pytest.raises(MemoryError, match="lstm_backward"):
        compiled.lstm_backward(*[None] * 9, 1, 2**50, 8, 8, 1)


@needs_compiler
def test_lack_of_memory_for_a_threads_blocks_is_an_error_of_python(tmp_path, monkeypatch):
    """The library is linked with an allocator that has none."""
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
    with pytest.raises(MemoryError, match="one_pass_input_grad"):
        layer.input_grad(y, torch.randn(50, 64))
    with pytest.raises(MemoryError, match="one_pass_weight_grad"):
        layer.weight_grad(y, x)


@needs_compiler
def test_the_wider_tile_of_other_processors(tmp_path, monkeypatch):
    """That of AVX-512, which the compiler makes of what this processor has."""
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
    """-ffast-math would have the processor flush them to zero, for the whole process."""
    native.library()
    assert (torch.tensor(1e-40) * 1.0).item() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_take_and_put_are_indexing(dtype, compiled, threads, monkeypatch):
    if not compiled:
        monkeypatch.setattr(copies, "library", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    matrix = torch.randn(300, 130).to(dtype)
    starts, lengths = torch.tensor([128, 3, 40, 64]), torch.tensor([2, 16, 1, 30])
    columns = Units(starts, lengths, 49)
    rows = Units(torch.tensor([7, 250, 0, 100]), torch.tensor([1, 40, 6, 90]), 137)
    try:
        for r in (rows, Units.every(300)):
            for c in (columns, Units.every(130)):
                expected = matrix[r.index][:, c.index]
                assert torch.equal(copies.take(matrix, r, c), expected)
                for clear in (True, False):
                    target, wanted = torch.ones_like(matrix), torch.ones_like(matrix)
                    if clear:
                        wanted[r.index] = 0
                    wanted[r.index[:, None], c.index] = expected
                    copies.put(target, r, c, expected, clear)
                    assert torch.equal(target, wanted)
        assert torch.equal(copies.take(matrix.t(), Units.every(130), Units.every(300)), matrix.t())
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("n", [1037, 1040])  # rows that begin anywhere in a cache line, and at its beginning
def test_what_is_written_past_the_caches_is_all_of_it_and_nothing_else(n, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, columns = (Units(*fields) for fields in (_ranges(700, generator), _ranges(n, generator)))
    a, b = torch.randn(rows.count, 40, generator=generator), torch.randn(40, columns.count, generator=generator)
    for large in (False, True):
        monkeypatch.setattr(copies, "_LARGE", 0 if large else 1 << 62)
        matrix = torch.ones(1400, n)
        target = matrix[-700:]
        wanted = target.clone()
        wanted[rows.index[:, None], columns.index] = 0
        copies.zero(target, rows, columns)
        assert torch.equal(target, wanted)
        out = Submatrix(target, rows, columns)
        product.multiply([(Submatrix.whole(a), Submatrix.whole(b), out, False)], past_caches=True)
        wanted[rows.index[:, None], columns.index] = a @ b
        torch.testing.assert_close(target, wanted, rtol=1e-5, atol=1e-4)
        assert matrix[:-700].eq(1).all()
    every = torch.ones(700, n)
    copies.zero(every, Units.every(700), Units.every(n))
    assert not every.any()


def _ranges(n, generator):
    """Starts, lengths and number of units: blocks of 16 in some order, an odd one among them."""
    starts = torch.randperm(n // 16, generator=generator)[: n // 20] * 16
    lengths = torch.full_like(starts, 16)
    lengths[3] = 5
    return starts, lengths, int(lengths.sum())


def test_a_buffer_of_a_size_that_does_not_vary_is_not_rounded_up():
    buffers.free_buffers()
    like = torch.empty(0)
    assert buffers.buffer((1001, 1003), like).untyped_storage().nbytes() > 4 * 1001 * 1003
    assert buffers.buffer((1001, 1003), like, exact=True).untyped_storage().nbytes() == 4 * 1001 * 1003
    buffers.free_buffers()


@pytest.mark.parametrize("options", [{}, {"interleave": False}, {"pattern": "tile"}])
def test_what_others_free_is_not_kept(options):
    """The logits of a large vocabulary, which the loss copies: held too, they would be there twice."""
    from torch import nn

    from approxdrop_lightning import approximate, resample

    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 8000))
    approximate(model, seed=0, min_multiplies=0, **options)
    buffers.free_buffers()
    resample(model)
    logits = model(torch.randn(100, 32))
    assert 4 * logits.numel() > buffers._KEEP_FROM_BYTES
    held = [entry for entries in buffers._pool.storages.values() for entry in entries]
    assert logits.untyped_storage().data_ptr() not in [storage.data_ptr() for storage, _ in held]


def test_a_buffer_is_not_handed_out_while_somebody_holds_a_view_of_it():
    like = torch.empty(0)
    first = buffers.buffer((800, 800), like)
    view, address = first[3:5], first.data_ptr()
    assert buffers.buffer((800, 800), like).data_ptr() != address
    del first
    assert buffers.buffer((800, 800), like).data_ptr() != address
    del view
    again = buffers.buffer((800, 800), like)
    assert again.data_ptr() == address
    assert buffers.buffer((800, 800), like).data_ptr() != address
    buffers.free_buffers()
    again.fill_(1.0)  # its memory is its own still


def test_buffers_of_many_sizes_do_not_pile_up():
    """Kept shares differ from step to step, so sizes do."""
    buffers.free_buffers()
    like = torch.empty(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        height = int(torch.randint(400, 4000, (), generator=generator))
        assert buffers.buffer((height, 700), like).shape == (height, 700)
    held = sum(len(entries) * size for size, entries in buffers._pool.storages.items())
    assert held < 40 * 4 * 700 * 4000  # of 3,600 sizes: eight for each doubling, and one at a time
    for _ in range(buffers._IDLE_REQUESTS + 1):
        buffers.buffer((700, 1000), like)
    buffers.buffer((20000, 1000), like)  # a new one: now those that nobody asks for are given back
    assert sum(len(entries) for entries in buffers._pool.storages.values()) == 2
    buffers.free_buffers()


def test_a_gradient_that_is_kept_is_not_written_again():
    """The optimizer drops gradients after each step; somebody who keeps one must find it unchanged."""
    from torch import nn

    from approxdrop_lightning import approximate, resample

    model = nn.Sequential(nn.Linear(800, 800), nn.Dropout(0.5), nn.Linear(800, 800))
    approximate(model, seed=0)
    kept = []
    for _ in range(4):
        resample(model)
        model.zero_grad()
        model(torch.randn(32, 800)).square().sum().backward()
        kept.append([(p.grad, p.grad.clone()) for p in model.parameters()])
    for pairs in kept:
        assert all(torch.equal(a, b) for a, b in pairs)
