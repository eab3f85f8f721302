"""Find: the dropouts of a captured graph, and the linear layers before and after each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from approxdrop_lightning.graph.book import Book, Entry, site_of
from approxdrop_lightning.graph.mutation import mutated
from approxdrop_lightning.graph.nodes import is_linear, rows
from approxdrop_lightning.graph.operator import DROP
from approxdrop_lightning.graph.rules import rule_for
from approxdrop_lightning.graph.rules.rule import Rule, is_tensor, shape, value
from approxdrop_lightning.graph.rules.views import Transpose, View


@dataclass(eq=False)
class Drop:
    """A dropout of the graph.

    Attributes:
        node: The node of :func:`.operator.drop`.
        book: Patterns of the model.
        site: The dropout of the model.
        pair: ``(dp, keep)`` for which the graph is compiled.
        members: Nodes before it that can be computed for kept units only, with the number of chunks of ``n`` units
            each of them has (gates).
        producers: Linear layers among the members.
        orders: Transposes and views, from a member or an input of one to the dropout, by which its rows get into the
            order of the dropout; empty if they are in it.
        consumers: Linear layers that read its output through functions that keep zeros.
        packs_before: Whether the members are computed for kept units only.
        native: Whether PyTorch's own dropout runs, as skipping would not gain.
        entry: Its pattern; None if it is native, or if ``keep == dp``.
        values: Its packed output, once emitted.
    """

    node: Node
    book: Book
    site: Any
    pair: tuple[int, int]
    members: dict[Node, int] = field(default_factory=dict)
    producers: list[Node] = field(default_factory=list)
    orders: dict[Node, tuple[Node, ...]] = field(default_factory=dict)
    consumers: list[Node] = field(default_factory=list)
    packs_before: bool = False
    native: bool = False
    entry: Entry | None = None
    values: Node | None = None

    @property
    def x(self) -> Node:
        """Its input."""
        assert isinstance(self.node.args[0], Node)
        return self.node.args[0]

    @property
    def table(self) -> Node:
        """The input of the graph that holds the patterns."""
        assert isinstance(self.node.args[1], Node)
        return self.node.args[1]

    @property
    def n(self) -> int:
        """Number of units."""
        return int(shape(self.x)[-1])

    @property
    def live(self) -> Entry:
        """Its pattern, which it must have."""
        assert self.entry is not None
        return self.entry


class Dropouts:
    """The dropouts of one graph.

    Args:
        graph: The graph.
        recomputed: Whether it is computed again for the backward pass.

    Attributes:
        drops: By node, in the order of the graph.
        mutated: Tensors that are changed in place, and all that may share their memory.
    """

    def __init__(self, graph: Graph, recomputed: bool = False) -> None:
        self.graph, self.recomputed = graph, recomputed
        self.drops: dict[Node, Drop] = {}
        self.mutated = mutated(graph)
        self._symbols = {
            str(value(n).node.expr): n
            for n in graph.nodes
            if n.op == "placeholder" and isinstance(value(n), torch.SymInt)
        }
        for node in graph.nodes:
            if node.op == "call_function" and node.target in DROP:
                book, site = site_of(node.args[2])
                self.drops[node] = Drop(node, book, site, (node.args[3], node.args[4]))

    @property
    def some_skip(self) -> bool:
        """Whether a dropout skips, as far as it is decided; if none does, the graph stays that of the stock model."""
        return not all(drop.native for drop in self.drops.values())

    def find_layers(self) -> None:
        """Find the producers and consumers of all dropouts."""
        for drop in self.drops.values():
            self._find_producers(drop)
        for node in self.graph.nodes:
            if is_linear(node) and (source := self.source(node.args[0])) is not None:
                source.consumers.append(node)

    def _find_producers(self, drop: Drop) -> None:
        """Walk back from a dropout through nodes that nothing else reads."""
        if not is_tensor(drop.x) or not shape(drop.x) or not isinstance(shape(drop.x)[-1], int):
            return
        wanted: dict[Node, int] = {drop.x: 1}
        drop.orders[drop.x] = ()
        inner: set[Node] = {drop.node}
        nodes = list(self.graph.nodes)
        for node in reversed(nodes[: nodes.index(drop.node)]):
            chunks = wanted.get(node, 0)
            if not chunks or node in self.mutated or not all(user in inner for user in node.users):
                continue
            if is_linear(node):
                if self.kind(node, drop, chunks) == "values":
                    drop.members[node] = chunks
                    drop.producers.append(node)
                continue
            rule = rule_for(node)
            if rule is None or (is_tensor(node) and self.kind(node, drop, chunks) is None):
                continue
            operands = rule.operands(node, chunks)
            if operands is None or any(wanted.get(n, c) != c for n, c in operands):
                continue
            order = _extended(node, rule, drop.orders[node])
            if any(drop.orders.get(n, order) != order for n, _ in operands):
                continue
            if any(c > 0 and is_tensor(n) and self.kind(n, drop, c) is None for n, c in operands):
                continue
            drop.members[node] = chunks
            inner.add(node)
            wanted.update(operands)
            drop.orders.update((n, order) for n, _ in operands)

    @staticmethod
    def kind(node: Node, drop: Drop, chunks: int) -> str | None:
        """How a tensor relates to the dropped one.

        Returns:
            ``"values"``: it has a value for each of the dropped ones; ``"units"``: one for each unit; ``"rows"``: one
            for each row; ``"number"``: one for all; None: it does not fit.
        """
        dims, n = shape(node), chunks * drop.n
        if dims and dims[-1] == n and rows(dims) == rows(shape(drop.x)):
            return "values"
        if math.prod(d for d in dims if isinstance(d, int)) == 1 and all(isinstance(d, int) for d in dims):
            return "number"
        if all(isinstance(d, int) and d == 1 for d in dims[:-1]) and dims[-1] == n:
            return "units"
        if isinstance(dims[-1], int) and dims[-1] == 1 and rows(dims) == rows(shape(drop.x)):
            return "rows"
        return None

    def source(self, node: Any) -> Drop | None:
        """The dropout from which a node is computed by functions that keep zeros; None if there is none."""
        return self.path(node)[0]

    def path(self, node: Any) -> tuple[Drop | None, tuple[Node, ...]]:
        """As :meth:`source`, and the transposes and views between them; none of these if there is no transpose."""
        views: list[Node] = []
        while isinstance(node, Node) and node not in self.drops:
            rule = rule_for(node)
            if node in self.mutated or rule is None or not rule.keeps_zero(node):
                return None, ()
            operands = rule.operands(node, 1)
            if operands is None or len(operands) != 1:
                return None, ()
            if isinstance(rule, View):
                views.append(node)
            node = operands[0][0]
        if node in self.mutated or node not in self.drops:
            return None, ()
        transposed = any(isinstance(rule_for(view), Transpose) for view in views)
        return self.drops[node], tuple(reversed(views)) if transposed else ()

    def between(self, drop: Drop) -> set[Node]:
        """Nodes between a dropout and its consumers."""
        found: set[Node] = set()
        for consumer in drop.consumers:
            node = consumer.args[0] if consumer.args else None  # erased ones have none
            while isinstance(node, Node) and node not in self.drops and node not in found:
                rule = rule_for(node)
                if rule is None or not rule.keeps_zero(node):
                    break
                found.add(node)
                node = node.args[0]
        return found

    def has_known_sizes(self, node: Node) -> bool:
        """Whether each leading size of a node is a number or an input of the graph."""
        return all(isinstance(d, int) or str(d.node.expr) in self._symbols for d in shape(node))

    def leading(self, node: Node) -> tuple[Any, ...]:
        """Leading shape of a node: numbers, and nodes for symbolic sizes."""
        return tuple(d if isinstance(d, int) else self._symbols[str(d.node.expr)] for d in shape(node)[:-1])


def _extended(node: Node, rule: Rule, order: tuple[Node, ...]) -> tuple[Node, ...]:
    """The order of the inputs of a node, given its own."""
    moves = isinstance(rule, Transpose) or (isinstance(rule, View) and order)
    return (node, *order) if moves else order
