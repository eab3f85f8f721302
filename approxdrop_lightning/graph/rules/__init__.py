"""Functions that the pass can compute on packed values: one file per kind, one rule per function.

To add one, write a :class:`~.rule.Rule` and append it to :data:`RULES`. ``tests/graph/test_rules.py`` shows how to
test it: a model of three lines, and how many layers must have been rewritten.

A rule answers three questions about a node:

1. ``operands``: which inputs must be packed, and how wide are they? None if the rule does not apply.
2. ``keeps_zero``: does it map zero to zero? Only then may it stand between a dropout and a consumer.
3. ``emit``: the node that computes the same from packed inputs, ``[groups, rows, width]``. Elementwise functions stay
   as they are.
"""

from __future__ import annotations

from torch.fx import Node

from approxdrop_lightning.graph.rules.gates import Chunk, ChunkItem, Glu
from approxdrop_lightning.graph.rules.pointwise import Cast, Pointwise, Prelu
from approxdrop_lightning.graph.rules.rule import Rule
from approxdrop_lightning.graph.rules.views import Transpose, View, Whole

RULES: tuple[Rule, ...] = (Pointwise(), Cast(), Prelu(), View(), Whole(), Transpose(), ChunkItem(), Chunk(), Glu())


def rule_for(node: Node) -> Rule | None:
    """The rule that applies to a node, or None."""
    return next((rule for rule in RULES if rule.fits(node)), None)
