"""Compiled models and what they must equal: backends that need no code generator, and a masked reference."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from approxdrop_lightning.graph.layout import mask_of
from approxdrop_lightning.graph.rewrite import Rewriter, rewrite


def rewriting(gm: GraphModule, inputs):
    """The rewritten graph, run as it is."""
    rewrite(gm)
    return gm.forward


def masking(gm: GraphModule, inputs):
    """The graph as it was captured, each dropout a mask of the pattern that the pass would give it."""
    for child in gm.children():
        if isinstance(child, GraphModule):
            masking(child, ())

    class Masking(Rewriter):
        def _emit(self, drop):
            graph = self.graph
            with graph.inserting_before(drop.node):
                if drop.entry is None:
                    drop.node.replace_all_uses_with(self._native(drop))
                else:
                    new = graph.call_function(masked, (drop.x, drop.table, drop.entry.use, drop.entry.rows))
                    drop.node.replace_all_uses_with(new)

        def _sweep(self, but=None):
            for node in self.drops:
                self.graph.erase_node(node)

    Masking(gm.graph).run()
    gm.recompile()
    return gm.forward


def masked(x, table, use, rows):
    return x * mask_of(use, table, rows, tuple(x.shape[:-1]), x.dtype)


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
