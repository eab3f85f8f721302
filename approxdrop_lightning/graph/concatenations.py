"""Concatenations along the units: split the dropouts after them and the layers that read them.

``drop(f(cat(a, b)))`` becomes ``cat(drop(f(a)), drop(f(b)))`` for elementwise ``f``, each part with a pattern of its
own; ``linear(cat(a, b), [V W])`` becomes ``linear(a, V) + linear(b, W)``. The rest of the pass then needs no rule for
concatenations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.fx import Graph, Node

from approxdrop_lightning.graph.chains import Chains, keeps_zero, parts_of
from approxdrop_lightning.graph.decide import gains
from approxdrop_lightning.graph.find import Drop, Dropouts
from approxdrop_lightning.graph.nodes import bias, is_linear, multiplies, weight
from approxdrop_lightning.graph.rules.rule import argument, is_last, overloads, shape

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
        self.graph, self.chains = graph, Chains(graph, mutated)

    def layers_before(self, drop: Node) -> list[Node]:
        """Linear layers that compute parts of the concatenation before a dropout; empty if there is none."""
        _, cat = self.chains.back(drop.args[0], _CAT, _joins_units)
        roots = [] if cat is None else [self.chains.root(part) for part in parts_of(cat)]
        return [root for root in roots if is_linear(root)]

    def split_dropout(self, drop: Node) -> list[Node]:
        """Replace a dropout for which :meth:`layers_before` found layers by one for each part.

        Returns:
            The dropouts, in the order of the parts.
        """
        chain, cat = self.chains.back(drop.args[0], _CAT, _joins_units)
        assert cat is not None
        found = self.chains.split(drop, chain, [(part, _of(units)) for part, units in _units(cat)])
        with self.graph.inserting_before(drop):
            joined = self.chains.like(drop, (found, -1), target=torch.cat)
        drop.replace_all_uses_with(joined)
        for node in (drop, *chain, cat):
            self.graph.erase_node(node)
        return found

    def parts_read(self, layer: Node) -> list[tuple[Node, slice]] | None:
        """Parts of the concatenation that a layer reads, with their units; None if it reads none."""
        chain, cat = self.chains.back(layer.args[0], _CAT, _joins_units)
        return _units(cat) if cat is not None and all(map(keeps_zero, chain)) else None

    def split_layer(self, layer: Node) -> list[Node]:
        """Replace a layer for which :meth:`parts_read` found parts by a sum of one layer for each part."""
        chain, cat = self.chains.back(layer.args[0], _CAT, _joins_units)
        assert cat is not None
        whole, found = weight(layer), list[Node]()
        total: Node | None = None
        with self.graph.inserting_before(layer):
            for part, units in _units(cat):
                x = self.chains.through(chain, part, _of(units))
                columns = self.chains.like(whole, (whole, (slice(None), units)), _of(units), operator.getitem)
                found.append(self.chains.like(layer, (x, columns, None if found else bias(layer))))
                found[-1].kwargs = {}
                total = (
                    found[-1] if total is None else self.chains.like(layer, (total, found[-1]), target=operator.add)
                )
        assert total is not None
        layer.replace_all_uses_with(total)
        self.chains.erase_unread([layer, *chain, cat])
        return found


def _of(units: slice) -> Callable[[Tensor], Tensor]:
    return lambda x: x[..., units]


def _units(cat: Node) -> list[tuple[Node, slice]]:
    """The parts of a concatenation, with their ranges of units."""
    ends = list(accumulate(shape(part)[-1] for part in parts_of(cat)))
    return [(part, slice(end - shape(part)[-1], end)) for part, end in zip(parts_of(cat), ends, strict=True)]


def _joins_units(cat: Node) -> bool:
    parts = parts_of(cat)
    if not parts or not is_last(argument(cat, 1, "dim", 0), cat) or len(shape(cat)) < 2:
        return False
    return all(isinstance(shape(part)[-1], int) for part in parts)
