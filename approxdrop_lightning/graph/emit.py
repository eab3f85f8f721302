"""Emit: replace dropouts and the layers beside them by packed products (:mod:`.packed`), or by native dropout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from approxdrop_lightning.graph import packed, random_mask
from approxdrop_lightning.graph.counts import COUNTS
from approxdrop_lightning.graph.find import Drop, Dropouts
from approxdrop_lightning.graph.names import function_name, layer_key, layer_name
from approxdrop_lightning.graph.nodes import bias, multiplies, weight
from approxdrop_lightning.graph.rules import rule_for
from approxdrop_lightning.graph.rules.rule import overloads, shape, tensors
from approxdrop_lightning.graph.rules.views import Transpose

RELU = overloads("relu", "relu_")


def without_pattern(dropouts: Dropouts, drop: Drop) -> Node:
    """A dropout without a pattern: conventional dropout, or a factor if the pair keeps everything."""
    site = drop.site
    if not drop.native:
        scale = 1 / (1 - site.rate) if site.scale_by == "rate" else 1.0
        return dropouts.graph.call_function(torch.mul, (drop.x, scale))
    COUNTS.native += 1
    if not drop.producers and not drop.consumers:
        for reader in drop.node.users:
            site.read_whole(function_name(reader))
    if dropouts.some_skip and not dropouts.recomputed and random_mask.serves(drop.x):
        number = list(dropouts.drops.values()).index(drop)
        return random_mask.dropout(dropouts.graph, drop.x, site.rate, number)
    return dropouts.graph.call_function(F.dropout, (drop.x, site.rate, True, False))


class Emitter:
    """Rewrites one graph in place.

    Args:
        dropouts: Its dropouts, of which those that skip have an entry.
    """

    def __init__(self, dropouts: Dropouts) -> None:
        self.dropouts, self.graph = dropouts, dropouts.graph
        self._replaced: set[Node] = set()

    def run(self) -> None:
        """Replace all dropouts, from the last one on: a layer between two of them is emitted once, for both."""
        for drop in reversed(self.dropouts.drops.values()):
            self._replaced.add(drop.node)
            if drop.entry is None:
                with self.graph.inserting_before(drop.node):
                    new = without_pattern(self.dropouts, drop)
                drop.node.replace_all_uses_with(new)
            else:
                self._replace(drop)
        self._sweep()

    def _replace(self, drop: Drop) -> None:
        for consumer in drop.consumers:
            if not consumer.users:  # emitted already, as the producer of a later dropout
                continue
            with self.graph.inserting_before(consumer):
                new = self.layer(consumer, None)
            consumer.replace_all_uses_with(new)
            self._replaced.add(consumer)
        self._sweep(but=drop.node)
        if drop.node.users:
            for reader in drop.node.users:
                drop.site.read_whole(function_name(reader))
            with self.graph.inserting_before(drop.node):
                drop.node.replace_all_uses_with(self._dense(drop))
        self._sweep()

    def _dense(self, drop: Drop) -> Node:
        """The dense output of a dropout."""
        entry = drop.live
        if drop.packs_before:
            COUNTS.unpacked += 1
            args = (self.values(drop), drop.table, entry.use, entry.rows, self.dropouts.leading(drop.node))
            return self.graph.call_function(packed.unpack, args)
        COUNTS.masked += 1
        return self.graph.call_function(packed.mask, (drop.x, drop.table, entry.use, entry.rows))

    def values(self, drop: Drop) -> Node:
        """The packed output of a dropout."""
        if drop.values is not None:
            return drop.values
        x, relu = drop.x, drop.packs_before and drop.x in drop.members and drop.x.target in RELU
        if relu:
            # relu(x) * scale = relu(x * scale): what the next product saves for backward then also serves relu.
            x = tensors(x)[0]
        with self.graph.inserting_before(drop.node):
            if drop.packs_before:
                made = _Before(self, drop).operand(x, drop.node)
            else:
                made = self.graph.call_function(packed.pack, (drop.x, drop.table, drop.live.use, drop.live.rows))
        with self.graph.inserting_before(drop.node):
            drop.values = self.graph.call_function(packed.scaled, (made, drop.table, drop.live.use))
            if relu:
                drop.values = self.graph.call_function(torch.relu, (drop.values,))
        return drop.values

    def layer(self, node: Node, outside: Drop | None, chunks: int = 1) -> Node:
        """A linear layer that reads kept inputs, computes kept outputs, or both.

        Args:
            node: The layer.
            outside: The dropout of its outputs, if only kept ones are computed.
            chunks: Number of chunks of units among its outputs.
        """
        x = node.args[0]
        assert isinstance(x, Node)
        inside, views = self.dropouts.path(x)
        if inside is not None and (inside.entry is None or not _line_up(inside, outside, node, views)):
            inside = None
        some = inside or outside
        assert some is not None
        name = layer_name(node, some.book.calls.names)
        with self.graph.inserting_before(node):
            if inside is not None:
                x = _After(self, inside).operand(x, node)
                inside.site.consumers.add(name)
                COUNTS.consumers += 1
            elif outside is not None:
                x = self.in_order(outside, x, outside.orders[node])
        if outside is not None:
            outside.site.producers.add(name)
            COUNTS.producers += 1
        key = layer_key(node, some.book.calls.names)
        some.book.note(key, inside and inside.site, outside and outside.site, multiplies(node))
        with self.graph.inserting_before(node):
            leading = None if outside is not None else self.dropouts.leading(some.node if views else node)
            args = (
                x, weight(node), bias(node), some.table,
                inside.live.use if inside else None, outside.live.use if outside else None, some.live.rows, chunks,
                leading,
            )  # fmt: skip
            new = self.graph.call_function(packed.linear, args)
            if outside is None and views:
                new = self._moved(new, views, shape(node)[-1])
                new = self.graph.call_method("reshape", (new, *self.dropouts.leading(node), shape(node)[-1]))
            return new

    def in_order(self, drop: Drop, x: Node, order: tuple[Node, ...]) -> Node:
        """A dense tensor with its rows in the order of a dropout, and in its shape if groups depend on that."""
        n = shape(x)[-1]
        same_shape = not order and shape(x)[:-1] == shape(drop.node)[:-1]
        x = self._moved(x, order, n)
        if not drop.live.rows.pad or same_shape:
            return x
        return self.graph.call_method("reshape", (x, *self.dropouts.leading(drop.node), n))

    def _moved(self, x: Node, views: tuple[Node, ...], n: int) -> Node:
        """Apply transposes and views to another tensor, whose last size is ``n``."""
        for view in views:
            if isinstance(rule_for(view), Transpose):
                x = self.graph.create_node(view.op, view.target, (x, *view.args[1:]), dict(view.kwargs))
            else:
                x = self.graph.call_method("reshape", (x, *self.dropouts.leading(view), n))
        return x

    def _sweep(self, but: Node | None = None) -> None:
        """Erase replaced nodes without users. No others: the graph may contain functions that work in place."""
        live = [drop for drop in self.dropouts.drops.values() if drop.entry is not None]
        ours = self._replaced.union(*(drop.members for drop in live), *map(self.dropouts.between, live))
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node is not but and node in ours:
                self.graph.erase_node(node)


def _line_up(inside: Drop, outside: Drop | None, layer: Node, views: tuple[Node, ...]) -> bool:
    """Whether one product can serve the patterns of a layer's inputs and of its outputs."""
    if outside is None:
        return True
    if views or outside.orders[layer]:
        return False
    rows = inside.live.rows
    same_shape = not rows.pad or shape(inside.node)[:-1] == shape(outside.node)[:-1]
    return rows == outside.live.rows and same_shape and inside.table is outside.table


class _Before:
    """Emits packed nodes for the members before a dropout (a :class:`.rule.Packer`)."""

    def __init__(self, emitter: Emitter, drop: Drop) -> None:
        self.emitter, self.drop, self.graph = emitter, drop, emitter.graph
        self._made: dict[Node, Node] = {}

    def operand(self, node: Node, reader: Node) -> Node:
        drop = self.drop
        if node in self._made:
            return self._made[node]
        if node in drop.producers:
            new = self.emitter.layer(node, drop, drop.members[node])
        elif node in drop.members:
            rule = rule_for(node)
            assert rule is not None
            new = rule.emit(node, self)
        else:
            return self._pack(node, reader)
        self._made[node] = new
        return new

    def _pack(self, node: Node, reader: Node) -> Node:
        """Pack a dense tensor."""
        drop, live = self.drop, self.drop.live
        chunks = max(1, drop.members.get(reader, 1))
        kind = Dropouts.kind(node, drop, chunks)
        with self.graph.inserting_before(reader):
            if kind == "values":
                x = self.emitter.in_order(drop, node, drop.orders.get(node, ()))
                args = (x, drop.table, live.use, live.rows, chunks)
                return self.graph.call_function(packed.pack, args)
            if kind == "units":
                return self.graph.call_function(packed.pack_units, (node, drop.table, live.use, chunks))
            if kind == "rows":
                x = self.emitter.in_order(drop, node, drop.orders.get(node, ()))
                return self.graph.call_function(packed.pack_rows, (x, live.rows))
        return node

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Node) -> Node:
        with self.graph.inserting_before(like):
            create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
            return create(target, args, kwargs)


class _After(_Before):
    """Emits packed nodes between a dropout and its consumers."""

    def operand(self, node: Node, reader: Node) -> Node:
        if node is self.drop.node:
            return self.emitter.values(self.drop)
        rule = rule_for(node)
        assert rule is not None
        return rule.emit(node, self)
