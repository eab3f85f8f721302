"""The compact recurrence against its definition: outputs and every gradient."""

import pytest
import torch
from support.kernels import needs_compiler

from approxdrop_lightning.ops.lstm import compact, reference, sequence
from approxdrop_lightning.ops.native.library import library


@pytest.mark.parametrize("hidden", [1, 7, 40])
@pytest.mark.parametrize("share", [None, 1, 2, 7])
@pytest.mark.parametrize("kind", ["double", "single", "single, compiled"])
def test_outputs_and_gradients_are_those_of_the_definition(hidden, share, kind, monkeypatch):
    dtype = torch.float64 if kind == "double" else torch.float32
    if kind == "single":
        monkeypatch.setattr(compact, "library", lambda: None)
    elif kind == "single, compiled" and library() is None:
        pytest.skip("no C compiler on this machine")
    generator = torch.Generator().manual_seed(hidden)
    kept = None if share is None else torch.randperm(hidden, generator=generator)[: max(1, hidden // share)]
    depth = hidden if kept is None else len(kept)
    shapes = ((3, 5, 4 * hidden), (5, hidden), (5, hidden), (4 * hidden, depth))
    exact = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    leaves = [t.detach().to(dtype).requires_grad_() for t in exact]
    wanted, found = reference.sequence(*exact, kept), sequence(*leaves, kept)
    directions = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in wanted]
    wanted += torch.autograd.grad(wanted, exact, directions)
    found += torch.autograd.grad(found, leaves, [d.to(dtype) for d in directions])
    for mine, theirs in zip(found, wanted, strict=True):
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


@needs_compiler
def test_an_lstm_step_at_the_ends_of_the_range(monkeypatch):
    """Relative errors of exp are below 3e-7; saturated gates, zeros, infinities and NaN behave as in PyTorch."""
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-8, -1e-4, 1e30, -1e30])])
    special = torch.tensor([float("inf"), -float("inf"), float("nan")])
    gates = torch.cat([values, special]).repeat(4)[None, None]
    hidden = gates.shape[2] // 4
    state = torch.zeros(1, hidden), torch.linspace(-2, 2, hidden)[None]
    weight, kept = torch.zeros(4 * hidden, 1), torch.tensor([0])
    results = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(compact, "library", lambda: None)
        inputs = [x.clone().requires_grad_() for x in (gates, *state)]
        out = compact.sequence(*inputs, weight, kept)
        results.append([*out, *torch.autograd.grad(out, inputs, [torch.ones_like(x) for x in out])])
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=2e-6, atol=5e-7, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "depth"), [(1, 1, 1, 1), (3, 20, 50, 17), (2, 7, 33, 33), (2, 3, 520, 260)]
)
def test_the_recurrence_is_that_of_pytorch(steps, batch, hidden, depth, threads, monkeypatch):
    """Partial bands and panels, several depths (4 * 520 > 1024), and gathered inputs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    kept = None if depth == hidden else torch.randperm(hidden)[:depth]
    inputs = [torch.randn(s) for s in ((steps, batch, 4 * hidden), (batch, hidden), (batch, hidden))]
    inputs.append(torch.randn(4 * hidden, depth) / depth**0.5)
    results = []
    try:
        for compiled in (True, False):
            if not compiled:
                monkeypatch.setattr(compact, "library", lambda: None)
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = compact.sequence(*leaves, kept)
            grads = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in out]
            results.append([*out, *torch.autograd.grad(out, leaves, grads)])
    finally:
        torch.set_num_threads(before)
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-5)
