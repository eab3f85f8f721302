"""What the pass knows of functions: one file per kind, one rule per function of a graph.

A rule says how a node is computed of kept units alone. To add one, write a :class:`~.rule.Rule` and put it into
:data:`RULES`; ``tests/graph/test_rules.py`` shows how it is tested: a model of three lines, and the counts of what
must have been rewritten.

A rule answers three questions about a node:

1. ``operands``: which of its inputs must be packed for it, and how wide they are; None if it does not fit this node.
2. ``keeps_zero``: is its result zero where its (one) packed input is zero? Then it may also stand *after* a dropout.
3. ``emit``: the node of the same result for packed inputs. Of kept units in ``[groups, rows, width]``, elementwise
   functions are what they were.
"""

from __future__ import annotations

from torch.fx import Node

from approxdrop_lightning.graph.rules.gates import Chunk, Glu, Piece
from approxdrop_lightning.graph.rules.pointwise import Cast, Pointwise, Prelu
from approxdrop_lightning.graph.rules.rule import Rule
from approxdrop_lightning.graph.rules.views import View, Whole

RULES: tuple[Rule, ...] = (Pointwise(), Cast(), Prelu(), View(), Whole(), Piece(), Chunk(), Glu())


def rule_for(node: Node) -> Rule | None:
    """The rule of a node, or None."""
    return next((rule for rule in RULES if rule.fits(node)), None)
