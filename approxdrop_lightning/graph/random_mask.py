"""Masks of conventional dropout, for the dropouts that stay native beside others that skip, on the CPU.

Inductor generates random numbers of its own there, one at a time and without vector instructions, in the same loop as
the functions around the dropout, which are then not vectorised either. A mask that is drawn beforehand takes a
tenth of the time even of PyTorch's own, and the loop that reads it is vectorised (docs/results.md).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, Node

from approxdrop_lightning.graph.rules.rule import shape, value

#: Fewest values of a dropout for which an opaque call is worth its host time.
LEAST = 1 << 15

_LIBRARY = torch.library.Library("approxdrop", "FRAGMENT")
# The tag keeps it from being folded to a constant, or computed again for the backward pass. `number` tells calls in a
# graph apart, in case a version of PyTorch merges equal ones all the same.
_LIBRARY.define(
    "random_mask(SymInt[] shape, float rate, int number) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)


def serves(x: Node) -> bool:
    """Whether a mask that is drawn beforehand is faster for a dropout of a tensor."""
    dims, found = shape(x), value(x)
    return found.device.type == "cpu" and all(isinstance(d, int) for d in dims) and math.prod(dims) >= LEAST


def dropout(graph: Graph, x: Node, rate: float, number: int) -> Node:
    """Emit conventional dropout.

    Args:
        graph: The graph.
        x: The input, of a shape that is known.
        rate: The rate, in (0, 1).
        number: Different for each dropout of the graph.
    """
    mask = graph.call_function(torch.ops.approxdrop.random_mask.default, (list(shape(x)), rate, number))
    kept = graph.call_function(torch.mul, (x, mask))
    return graph.call_function(torch.mul, (kept, 1 / (1 - rate)))


def _random_mask(shape: list[int], rate: float, number: int) -> Tensor:
    """True with probability ``1 - rate``, from PyTorch's generator of the CPU."""
    size = math.prod(shape)
    bits = np.random.SFC64(int(torch.randint(2**63 - 1, (), device="cpu"))).random_raw(-(-size // 2))
    return torch.from_numpy(bits.view(np.uint32)[:size] >= np.uint32(round(rate * 2**32))).view(shape)


_LIBRARY.impl("random_mask", _random_mask, "CompositeExplicitAutograd")


def _fake(shape: list[int], rate: float, number: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device="cpu")


torch.library.register_fake("approxdrop::random_mask", _fake, lib=_LIBRARY)
