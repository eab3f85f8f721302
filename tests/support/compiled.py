"""Compiled models and their masked references, by backends without a code generator."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from approxdrop_lightning import approximate, resample, restore
from approxdrop_lightning.conversion import conversion_of
from approxdrop_lightning.graph.reference import mask
from approxdrop_lightning.graph.rewrite import rewrite


def rewriting(gm: GraphModule, inputs):
    """Run the rewritten graph as it is."""
    rewrite(gm)
    return gm.forward


def masking(gm: GraphModule, inputs):
    """Run the captured graph, each dropout being a mask of the pattern that the pass gives it."""
    mask(gm)
    return gm.forward


def results(f, x, model, seed=0):
    """Output and gradients of a step; native dropout starts from the seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone().requires_grad_(x.is_floating_point())
    y = f(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    loss.backward()
    return [y.detach(), *([x.grad] if x.is_floating_point() else []), *(p.grad.clone() for p in model.parameters())]


def worst(found, expected):
    """Largest difference, relative to the norm of the tensor (or to 1e-4 of the largest norm)."""
    floor = 1e-4 * max(b.norm().item() for b in expected)
    return max(((a - b).norm() / max(b.norm().item(), floor)).item() for a, b in zip(found, expected, strict=True))


def converted(model, **options):
    """Convert a model so that it skips wherever possible; its report and its conversion."""
    report = approximate(model, **{"min_gain": 0, "seed": 3, **options})
    return report, conversion_of(model)


def equals_masks(model, x, steps=1, fullgraph=True, **options):
    """Largest difference in outputs and gradients between the rewritten model and masks; and the report."""
    report, conversion = converted(model, **options)
    f, g = (torch.compile(model, backend=backend, fullgraph=fullgraph) for backend in (rewriting, masking))
    largest = 0.0
    for step in range(steps):
        resample(model)
        found = results(f, x, model, step)
        conversion.resample(False)
        largest = max(largest, worst(found, results(g, x, model, step)))
    restore(model)
    return largest, report


class OneFunction(nn.Module):
    """A network given by its layers and one function."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.drop, self.other = nn.Dropout(0.5), nn.Dropout(0.5)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)
