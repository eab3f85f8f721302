"""The compiled kernels: found or done without, right to the last places of single precision, harmless to others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from approxdrop_lightning.ops import blocks, lstm, native
from approxdrop_lightning.pattern import Units

ROOT = Path(__file__).resolve().parents[1]
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler on this machine")
TRAIN = """
import torch
from approxdrop_lightning import approximate, resample
from approxdrop_lightning.ops.native import library
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
    assert train(tmp_path, PATH="") == (False, pytest.approx(value, rel=1e-5))
    made = library.stat().st_mtime_ns
    train(tmp_path)
    assert library.stat().st_mtime_ns == made
    assert train(tmp_path, APPROXDROP_NATIVE="0") == (False, pytest.approx(value, rel=1e-5))
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert train(blocked) == (False, pytest.approx(value, rel=1e-5))
    library.write_bytes(b"damaged")
    assert train(tmp_path) == (False, pytest.approx(value, rel=1e-5))


@needs_compiler
def test_an_lstm_step_at_the_ends_of_the_range():
    """Errors of exp are below 3e-7 of the result; saturated gates, zeros, infinities and NaN as PyTorch has them."""
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-8, -1e-4, 1e30, -1e30])])
    special = torch.tensor([float("inf"), -float("inf"), float("nan")])
    gates = torch.cat([values, special]).repeat(4)[None]
    c = torch.linspace(-2, 2, gates.shape[1] // 4)[None]
    results = []
    for library in (native.library, lambda: None):
        lstm.library, kept = library, lstm.library
        try:
            out = [torch.full_like(gates, -7.0), *(torch.full_like(c, -7.0) for _ in range(3))]
            lstm._forward_step(gates, c, *out)
            dc, dgates = torch.ones_like(c), torch.full_like(gates, -7.0)
            lstm._backward_step(out[0], c, out[2], torch.ones_like(c), torch.ones_like(c), dc, dgates)
        finally:
            lstm.library = kept
        results.append([*out, dc, dgates])
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=2e-6, atol=5e-7, equal_nan=True)


@needs_compiler
def test_tiny_numbers_keep_their_values():
    """-ffast-math would have the processor flush them to zero, for the whole process."""
    assert native.library() is not None
    assert (torch.tensor(1e-40) * 1.0).item() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_take_and_put_are_indexing(dtype, compiled, threads, monkeypatch):
    if not compiled:
        monkeypatch.setattr(blocks, "library", lambda: None)
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
                assert torch.equal(blocks.take(matrix, r, c), expected)
                for clear in (True, False):
                    target, wanted = torch.ones_like(matrix), torch.ones_like(matrix)
                    if clear:
                        wanted[r.index] = 0
                    wanted[r.index[:, None], c.index] = expected
                    blocks.put(target, r, c, expected, clear)
                    assert torch.equal(target, wanted)
        assert torch.equal(blocks.take(matrix.t(), Units.every(130), Units.every(300)), matrix.t())
    finally:
        torch.set_num_threads(before)


def test_a_buffer_is_not_handed_out_while_somebody_holds_a_view_of_it():
    like = torch.empty(0)
    first = blocks.buffer((600, 600), like)
    view, address = first[3:5], first.data_ptr()
    assert blocks.buffer((600, 600), like).data_ptr() != address
    del first
    assert blocks.buffer((600, 600), like).data_ptr() != address
    del view
    again = blocks.buffer((600, 600), like)
    assert again.data_ptr() == address
    assert blocks.buffer((600, 600), like).data_ptr() != address
    blocks.free_buffers()
    again.fill_(1.0)  # its memory is its own still


def test_buffers_of_many_sizes_do_not_pile_up():
    """Kept shares differ from step to step, so sizes do."""
    blocks.free_buffers()
    like = torch.empty(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        height = int(torch.randint(400, 4000, (), generator=generator))
        assert blocks.buffer((height, 700), like).shape == (height, 700)
    held = sum(len(entries) * size for size, entries in blocks._pool.storages.items())
    assert held < 40 * 4 * 700 * 4000  # of 3,600 sizes: eight for each doubling, and one at a time
    for _ in range(blocks._IDLE_REQUESTS + 1):
        blocks.buffer((300, 1000), like)
    blocks.buffer((20000, 1000), like)  # a new one: now those that nobody asks for are given back
    assert sum(len(entries) for entries in blocks._pool.storages.values()) == 2
    blocks.free_buffers()


def test_a_gradient_that_is_kept_is_not_written_again():
    """The optimizer drops gradients after each step; somebody who keeps one must find it unchanged."""
    from torch import nn

    from approxdrop_lightning import approximate, resample

    model = nn.Sequential(nn.Linear(600, 600), nn.Dropout(0.5), nn.Linear(600, 600))
    approximate(model, seed=0)
    kept = []
    for _ in range(4):
        resample(model)
        model.zero_grad()
        model(torch.randn(32, 600)).square().sum().backward()
        kept.append([(p.grad, p.grad.clone()) for p in model.parameters()])
    for pairs in kept:
        assert all(torch.equal(a, b) for a, b in pairs)
