"""Chains of elementwise functions, from a node of a graph back to what they are functions of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from approxdrop_lightning.graph.rules import rule_for
from approxdrop_lightning.graph.rules.pointwise import Cast, Pointwise, Prelu
from approxdrop_lightning.graph.rules.rule import is_tensor, shape, tensors, value

#: A node, and the function that takes its value out of that of a whole.
Part = tuple[Node, Callable[[Tensor], Tensor]]


class Chains:
    """Finds and copies chains of one graph.

    Args:
        graph: The graph, changed in place.
        mutated: Tensors that are changed in place: they are left alone.
    """

    def __init__(self, graph: Graph, mutated: set[Node]) -> None:
        self.graph, self.mutated = graph, mutated

    def back(
        self, x: Any, targets: frozenset[Any], fits: Callable[[Node], bool], alone: bool = True
    ) -> tuple[list[Node], Node | None]:
        """Walk back from ``x`` to a node of given targets.

        Args:
            x: Where to start.
            targets: Functions, and names of methods.
            fits: Whether a node of these targets is one that is looked for.
            alone: Whether nothing else may read what is on the way.

        Returns:
            The functions on the way, the last one first, and the node; no functions and None if there is none.
        """
        chain: list[Node] = []
        while isinstance(x, Node) and x not in self.mutated and (len(x.users) == 1 or not alone):
            if x.op in ("call_function", "call_method") and x.target in targets:
                return (chain, x) if fits(x) else ([], None)
            if (operand := _operand(x)) is None:
                break
            chain.append(x)
            x = operand
        return [], None

    def root(self, x: Node) -> Node:
        """What a tensor is an elementwise function of that nothing else reads on the way."""
        while (operand := _operand(x)) is not None and len(x.users) == 1:
            x = operand
        return x

    def through(self, chain: Sequence[Node], x: Node, of: Callable[[Tensor], Tensor]) -> Node:
        """Apply a chain of functions to another tensor, whose value is ``of`` that of the original one."""
        for node in reversed(chain):
            args = torch.fx.node.map_arg(node.args, partial(_replaced, {_operand(node): x}))
            x = self.like(node, args, of)
        return x

    def like(self, node: Node, args: Any, of: Callable[[Tensor], Tensor] = lambda x: x, target: Any = None) -> Node:
        """A new node, like another one but for its arguments; its value is ``of`` that of the other."""
        if target is None:
            new = self.graph.create_node(node.op, node.target, args, dict(node.kwargs))
        else:
            new = self.graph.call_function(target, args)
        new.meta = dict(node.meta)
        new.meta["example_value"] = of(value(node))
        return new

    def split(self, node: Node, chain: Sequence[Node], parts: Sequence[Part]) -> list[Node]:
        """New nodes like one that reads a chain: for each part, one that reads the chain of that part.

        Args:
            node: The node.
            chain: The functions that its first argument is made by, the last one first.
            parts: What the nodes are to be made of, each with the function that takes it out of the whole.
        """
        found = []
        with self.graph.inserting_before(node):
            for part, of in parts:
                found.append(self.like(node, (self.through(chain, part, of), *node.args[1:]), of))
        return found

    def erase_unread(self, nodes: Sequence[Node]) -> None:
        """Erase those of some nodes that nothing reads; each of them after what reads it."""
        for node in nodes:
            if not node.users:
                self.graph.erase_node(node)


def parts_of(node: Node) -> list[Node]:
    """The tensors that ``torch.cat`` or ``torch.stack`` joins; empty if they are fewer than two, or not known."""
    parts: Any = node.args[0] if node.args else None
    known = isinstance(parts, (list, tuple)) and len(parts) > 1 and is_tensor(node) and all(map(is_tensor, parts))
    return list(parts) if known and node.kwargs.get("out") is None else []


def keeps_zero(node: Node) -> bool:
    """Whether a function of a chain maps zero to zero."""
    rule = rule_for(node)
    return rule is not None and rule.keeps_zero(node)


def _replaced(by: dict[Node | None, Node], node: Node) -> Node:
    return by.get(node, node)


def _operand(node: Node) -> Node | None:
    """The input of an elementwise function of one tensor that treats all units alike; else None."""
    rule = rule_for(node)
    if not isinstance(rule, (Pointwise, Cast, Prelu)) or (operands := rule.operands(node, 1)) is None:
        return None
    if isinstance(rule, Prelu) and value(node.args[1]).numel() != 1:
        return None
    if isinstance(rule, Pointwise) and len(tensors(node)) != 1:
        return None
    operand = operands[0][0]
    return operand if shape(operand) == shape(node) else None
