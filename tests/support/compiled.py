"""Compiled models and what they must equal: backends that need no code generator, and a masked reference."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from approxdrop_lightning.graph.reference import mask
from approxdrop_lightning.graph.rewrite import rewrite


def rewriting(gm: GraphModule, inputs):
    """The rewritten graph, run as it is."""
    rewrite(gm)
    return gm.forward


def masking(gm: GraphModule, inputs):
    """The graph as it was captured, each dropout a mask of the pattern that the pass would give it."""
    mask(gm)
    return gm.forward


def results(f, x, model, seed=0):
    """Output and gradients of a step whose native dropouts begin with the same seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    y = f(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    loss.backward()
    return [y.detach(), *([x.grad] if x.is_floating_point() else []), *(p.grad.clone() for p in model.parameters())]


def worst(found, expected):
    """Largest difference, relative to the tensor and to what is one of many in size."""
    floor = 1e-4 * max(b.norm().item() for b in expected)
    return max(((a - b).norm() / max(b.norm().item(), floor)).item() for a, b in zip(found, expected, strict=True))
