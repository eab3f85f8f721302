"""Concatenations along the units: split the dropouts after them and the layers that read them.

``drop(f(cat(a, b)))`` becomes ``cat(drop(f(a)), drop(f(b)))`` for elementwise ``f``, each part with a pattern of its
own; ``linear(cat(a, b), [V W])`` becomes ``linear(a, V) + linear(b, W)``. The rest of the pass then needs no rule for
concatenations.
"""

from __future__ import annotations

import operator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Graph, Node

from approxdrop_lightning.graph.decide import gains
from approxdrop_lightning.graph.find import Drop, Dropouts
from approxdrop_lightning.graph.nodes import is_linear, multiplies, weight
from approxdrop_lightning.graph.rules import rule_for
from approxdrop_lightning.graph.rules.pointwise import Cast, Pointwise, Prelu
from approxdrop_lightning.graph.rules.rule import argument, is_last, is_tensor, overloads, shape, tensors, value

_CAT = overloads("cat", "concat", "concatenate")


def split_concatenations(dropouts: Dropouts) -> None:
    """Split the dropouts and layers after concatenations wherever skipping gains by it."""
    graph, drops = dropouts.graph, dropouts.drops
    concatenations = Concatenations(graph, dropouts.mutated)
    for node, drop in list(drops.items()):
        layers = concatenations.layers_before(node)
        if layers and gains(drop, sum(map(multiplies, layers))):
            del drops[node]
            for part in concatenations.split_dropout(node):
                drops[part] = Drop(part, drop.book, drop.site, drop.pair)
    for node in list(graph.nodes):
        if is_linear(node) and (read := concatenations.parts_read(node)) is not None:
            sources = [(dropouts.source(part), units.stop - units.start) for part, units in read]
            dropped = [(drop, units) for drop, units in sources if drop is not None]
            units = sum(units for _, units in dropped)
            if units and gains(dropped[0][0], multiplies(node) * units // shape(weight(node))[1]):
                concatenations.split_layer(node)
    dropouts.drops = {node: drops[node] for node in graph.nodes if node in drops}


class Concatenations:
    """Splits dropouts and layers of one graph.

    Args:
        graph: The graph, changed in place.
        mutated: Tensors that are changed in place: they are left alone.
    """

    def __init__(self, graph: Graph, mutated: set[Node]) -> None:
        self.graph, self.mutated = graph, mutated

    def layers_before(self, drop: Node) -> list[Node]:
        """Linear layers that compute parts of the concatenation before a dropout; empty if there is none."""
        _, cat = self._chain(drop.args[0])
        roots = [] if cat is None else [self._root(part) for part in _parts(cat)]
        return [root for root in roots if is_linear(root)]

    def split_dropout(self, drop: Node) -> list[Node]:
        """Replace a dropout for which :meth:`layers_before` found layers by one for each part.

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

    def parts_read(self, layer: Node) -> list[tuple[Node, slice]] | None:
        """Parts of the concatenation that a layer reads, with their units; None if it reads none."""
        chain, cat = self._chain(layer.args[0])
        return _units(cat) if cat is not None and all(map(_keeps_zero, chain)) else None

    def split_layer(self, layer: Node) -> list[Node]:
        """Replace a layer for which :meth:`parts_read` found parts by a sum of one layer for each part."""
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
        """Elementwise functions from ``x`` back to a concatenation of units, and the concatenation or None."""
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
        """Apply a chain of functions to one part."""
        x = part
        for node in reversed(chain):
            args = torch.fx.node.map_arg(node.args, partial(_replaced, {_operand(node): x}))
            x = self._like(node, args, units)
        return x

    def _like(self, node: Node, args: Any, units: slice, target: Any = None) -> Node:
        """A new node, like another one but for some of its units."""
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
    """The parts of a concatenation, with their ranges of units."""
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


def _keeps_zero(node: Node) -> bool:
    rule = rule_for(node)
    return rule is not None and rule.keeps_zero(node)
