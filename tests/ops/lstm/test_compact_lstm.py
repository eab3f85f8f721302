"""The compact recurrence against its definition: outputs and every gradient."""

import pytest
import torch

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
