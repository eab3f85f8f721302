"""Concatenations of units: a dropout behind one becomes one of each part, a layer that reads one a sum of layers.

``drop(f(cat(a, b)))`` is ``cat(drop(f(a)), drop(f(b)))`` for elementwise ``f``, each part with a pattern of its own;
``linear(cat(a, b), [V W])`` is ``linear(a, V) + linear(b, W)``. Then the rest of the pass finds layers, dropouts and
layers as ever.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Graph, Node

from approxdrop_lightning.graph.rules import rule_for
from approxdrop_lightning.graph.rules.pointwise import Cast, Pointwise, Prelu
from approxdrop_lightning.graph.rules.rule import argument, is_last, is_tensor, overloads, shape, tensors, value

_CAT = overloads("cat", "concat", "concatenate")


class Concatenations:
    """Splits them in one graph.

    Args:
        graph: Changed in place.
        mutated: Tensors that somebody changes in place: they are left alone.
        is_linear: Whether a node is a linear layer.
    """

    def __init__(self, graph: Graph, mutated: set[Node], is_linear: Callable[[Node], bool]) -> None:
        self.graph, self.mutated, self.is_linear = graph, mutated, is_linear

    def layers_before(self, drop: Node) -> list[Node]:
        """The linear layers among the parts that are dropped from."""
        _, cat = self._chain(drop.args[0])
        roots = [] if cat is None else [self._root(part) for part in _parts(cat)]
        return [root for root in roots if self.is_linear(root)]

    def split_dropout(self, drop: Node) -> list[Node]:
        """Make a dropout for each part of what is dropped from; :meth:`layers_before` has said that there are some.

        Returns:
            The dropouts, in the order of the parts.
        """
        chain, cat = self._chain(drop.args[0])
        assert cat is not None
        found = []
        with self.graph.inserting_before(drop):
            for part, units in _units(cat):
                x = self._through(chain, part, units)
                found.append(self._like(drop, (x, *drop.args[1:]), units))
            joined = self._like(drop, (found, -1), slice(None), torch.cat)
        drop.replace_all_uses_with(joined)
        for node in (drop, *chain, cat):
            self.graph.erase_node(node)
        return found

    def parts_read(self, layer: Node, drops: Callable[[Node], bool]) -> int:
        """Of how many inputs of a layer, parts of a concatenation, units are dropped; 0 if it reads no such one."""
        chain, cat = self._chain(layer.args[0])
        if cat is None or not all(_keeps_zero(node) for node in chain):
            return 0
        return sum(units.stop - units.start for part, units in _units(cat) if drops(part))

    def split_layer(self, layer: Node) -> list[Node]:
        """Make a layer for each part of what a layer reads; :meth:`parts_read` has said that units are dropped."""
        chain, cat = self._chain(layer.args[0])
        assert cat is not None
        weight, bias = argument(layer, 1, "weight"), argument(layer, 2, "bias")
        found: list[Node] = []
        total: Node | None = None
        with self.graph.inserting_before(layer):
            for part, units in _units(cat):
                x = self._through(chain, part, units)
                columns = self._like(weight, (weight, (slice(None), units)), units, operator.getitem)
                found.append(self._like(layer, (x, columns, None if found else bias), slice(None)))
                found[-1].kwargs = {}
                total = (
                    found[-1] if total is None else self._like(layer, (total, found[-1]), slice(None), operator.add)
                )
        assert total is not None
        layer.replace_all_uses_with(total)
        self.graph.erase_node(layer)
        for node in (*chain, cat):
            if not node.users:
                self.graph.erase_node(node)
        return found

    def _chain(self, x: Any) -> tuple[list[Node], Node | None]:
        """Elementwise functions from ``x`` back to a concatenation of units, and that; None if there is none."""
        chain: list[Node] = []
        while isinstance(x, Node) and x not in self.mutated and len(x.users) == 1:
            if x.op in ("call_function", "call_method") and x.target in _CAT:
                return (chain, x) if _joins_units(x) else ([], None)
            if (operand := _operand(x)) is None:
                break
            chain.append(x)
            x = operand
        return [], None

    def _root(self, x: Node) -> Node:
        while (operand := _operand(x)) is not None and len(x.users) == 1:
            x = operand
        return x

    def _through(self, chain: list[Node], part: Node, units: slice) -> Node:
        """What a chain of functions makes of one part."""
        x = part
        for node in reversed(chain):
            args = torch.fx.node.map_arg(node.args, partial(_replaced, {_operand(node): x}))
            x = self._like(node, args, units)
        return x

    def _like(self, node: Node, args: Any, units: slice, target: Any = None) -> Node:
        """A node of some of another one's units."""
        if target is None:
            new = self.graph.create_node(node.op, node.target, args, dict(node.kwargs))
        else:
            new = self.graph.call_function(target, args)
        new.meta = dict(node.meta)
        new.meta["example_value"] = value(node)[..., units]
        return new


def _replaced(by: dict[Node | None, Node], node: Node) -> Node:
    return by.get(node, node)


def _parts(cat: Node) -> list[Node]:
    parts: Any = cat.args[0]
    return list(parts)


def _units(cat: Node) -> list[tuple[Node, slice]]:
    """The parts of a concatenation, and which of its units they are."""
    ends = list(accumulate(shape(part)[-1] for part in _parts(cat)))
    return [(part, slice(end - shape(part)[-1], end)) for part, end in zip(_parts(cat), ends, strict=True)]


def _joins_units(cat: Node) -> bool:
    parts = cat.args[0] if cat.args else None
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or cat.kwargs.get("out") is not None:
        return False
    if not is_tensor(cat) or not is_last(argument(cat, 1, "dim", 0), cat) or len(shape(cat)) < 2:
        return False
    return all(is_tensor(part) and isinstance(shape(part)[-1], int) for part in parts)


def _operand(node: Node) -> Node | None:
    """The tensor that an elementwise function is of, if it is of one, whatever its units are."""
    rule = rule_for(node)
    if not isinstance(rule, (Pointwise, Cast, Prelu)) or (operands := rule.operands(node, 1)) is None:
        return None
    if isinstance(rule, Prelu) and value(node.args[1]).numel() != 1:
        return None
    if isinstance(rule, Pointwise) and len(tensors(node)) != 1:
        return None
    operand = operands[0][0]
    return operand if shape(operand) == shape(node) else None


def _keeps_zero(node: Node) -> bool:
    rule = rule_for(node)
    return rule is not None and rule.keeps_zero(node)
