"""The pass: ``linear -> elementwise* -> dropout -> elementwise* -> linear`` becomes products of kept units.

It works on the graph that Dynamo captured, before autograd is traced: only the forward is rewritten. Layers are found
by the data's own way, through whatever :mod:`.rules` know:

- A layer is *before* a dropout if nobody else reads what it makes: of its outputs only kept ones are computed.
- A layer *after* it reads kept inputs only, if on the way from the dropout dropped zeros stay zeros.

A dropout by which nothing is worth skipping becomes PyTorch's own again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from approxdrop_lightning.graph import packed
from approxdrop_lightning.graph.book import Book, Entry, site_of
from approxdrop_lightning.graph.concatenations import Concatenations
from approxdrop_lightning.graph.functional import functional_dropout
from approxdrop_lightning.graph.mutation import mutated
from approxdrop_lightning.graph.names import function_name, layer_name, module_name
from approxdrop_lightning.graph.operator import DROP
from approxdrop_lightning.graph.rules import rule_for
from approxdrop_lightning.graph.rules.rule import argument, is_tensor, overloads, shape, tensors, value
from approxdrop_lightning.policy import Thresholds, product_dtype

CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d})
RELU = overloads("relu", "relu_")
LINEAR = frozenset({F.linear, torch._C._nn.linear})


@dataclass
class Counts:
    """What was rewritten since the last :meth:`clear`: of all graphs, for tests and logs."""

    graphs: int = 0
    producers: int = 0
    consumers: int = 0
    unpacked: int = 0
    masked: int = 0
    native: int = 0

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]  # back to the defaults


COUNTS = Counts()


@dataclass(eq=False)
class Drop:
    """A dropout of the graph."""

    node: Node
    book: Book
    site: Any
    pair: tuple[int, int]
    members: dict[Node, int] = field(default_factory=dict)  # what is packed before it, and in how many runs
    layers: list[Node] = field(default_factory=list)  # linear layers among them
    readers: list[Node] = field(default_factory=list)  # linear layers after it
    packs_before: bool = False
    entry: Entry | None = None  # None: the native dropout
    values: Node | None = None  # its packed output, once made

    @property
    def x(self) -> Node:
        assert isinstance(self.node.args[0], Node)
        return self.node.args[0]

    @property
    def table(self) -> Node:
        assert isinstance(self.node.args[1], Node)
        return self.node.args[1]

    @property
    def n(self) -> int:
        return int(shape(self.x)[-1])

    @property
    def live(self) -> Entry:
        assert self.entry is not None
        return self.entry


class Rewriter:
    """Rewrites one graph in place."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.drops: dict[Node, Drop] = {}
        self.mutated = mutated(graph)
        self._replaced: set[Node] = set()
        self._symbols = {
            str(value(n).node.expr): n
            for n in graph.nodes
            if n.op == "placeholder" and isinstance(value(n), torch.SymInt)
        }

    def run(self) -> bool:
        """Rewrite; returns whether there was anything to do."""
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target in DROP:
                book, site = site_of(node.args[2])
                self.drops[node] = Drop(node, book, site, (node.args[3], node.args[4]))
        if not self.drops:
            return False
        self._split()
        self._count()
        self._name_functions()
        for drop in self.drops.values():
            self._look_back(drop)
        for node in self.graph.nodes:
            if self._is_linear(node) and (source := self.source(node.args[0])) is not None:
                source.readers.append(node)
        uses: dict[Any, int] = {}
        for drop in self.drops.values():
            self._decide(drop, uses)
        # From the last one on: a layer between two dropouts is made once, for both.
        for drop in reversed(self.drops.values()):
            self._emit(drop)
        self._sweep()
        self.graph.lint()
        COUNTS.graphs += 1
        return True

    def _split(self) -> None:
        """Split concatenations before a dropout, and those that a layer reads, where that gains."""
        concatenations = Concatenations(self.graph, self.mutated, self._is_linear)
        for node, drop in list(self.drops.items()):
            layers = concatenations.layers_before(node)
            if drop.pair[0] != drop.pair[1] and layers and self._gains(drop, sum(map(self._multiplies, layers))):
                del self.drops[node]
                for part in concatenations.split_dropout(node):
                    self.drops[part] = Drop(part, drop.book, drop.site, drop.pair)
        for node in list(self.graph.nodes):
            if not self._is_linear(node):
                continue
            read: list[Drop] = []
            units = concatenations.parts_read(node, partial(self._reads, read))
            if units and self._gains(read[0], self._multiplies(node) * units // shape(self.weight(node))[1]):
                concatenations.split_layer(node)
        self.drops = {node: self.drops[node] for node in self.graph.nodes if node in self.drops}

    def _reads(self, found: list[Drop], node: Node) -> bool:
        source = self.source(node)
        if source is not None:
            found.append(source)
        return source is not None

    def _gains(self, drop: Drop, multiplies: int) -> bool:
        """Whether skipping is worthwhile in layers of so many multiplies, all together."""
        x = value(drop.x)
        ask: Thresholds = drop.site.policy.at(x.device, product_dtype(x.device, x.dtype))
        return ask.compiled(int(multiplies * drop.site.rate)) is None

    def _count(self) -> None:
        """Note the multiplies of all layers; those that are rewritten are noted again."""
        book = next(iter(self.drops.values())).book
        for node in self.graph.nodes:
            if multiplies := self._multiplies(node):
                book.note(_key(node, book), None, None, multiplies)

    def _name_functions(self) -> None:
        """Report functions that drop and are no layers of the model: they stay as they are."""
        book = next(iter(self.drops.values())).book
        for node in self.graph.nodes:
            if (found := functional_dropout(node)) is not None:
                rate, place, reason = found
                book.left(f"{module_name(node, book.names) or 'the model'} ({place})", rate, reason)

    def _multiplies(self, node: Node) -> int:
        if self._is_linear(node):
            return _hint(math.prod(shape(node)[:-1])) * value(self.weight(node)).numel()
        if node.op == "call_function" and node.target in CONVOLUTIONS and is_tensor(node):
            kernel = shape(argument(node, 1, "weight"))[1:]
            return _hint(math.prod(shape(node))) * math.prod(kernel)
        if node.target is F.scaled_dot_product_attention and is_tensor(node):
            length = shape(argument(node, 1, "key"))[-2]
            return 2 * _hint(math.prod(shape(node))) * _hint(length)
        if node.target is F.multi_head_attention_forward:
            inputs = [shape(n) for n in node.args[:3] if isinstance(n, Node)]
            if len(inputs) == 3:
                query, key, entries = map(math.prod, inputs)
                width, length = inputs[0][-1], inputs[1][0]
                return _hint(2 * query * width + (key + entries) * width + 2 * query * length)
        return 0

    # -- finding

    def _is_linear(self, node: Node) -> bool:
        if node.op != "call_function" or node.target not in LINEAR or not is_tensor(node) or not node.args:
            return False
        return len(shape(self.weight(node))) == 2

    @staticmethod
    def weight(layer: Node) -> Node:
        """The weight of a linear layer."""
        return argument(layer, 1, "weight")

    @staticmethod
    def bias(layer: Node) -> Node | None:
        """Its bias."""
        return argument(layer, 2, "bias")

    def _look_back(self, drop: Drop) -> None:
        """Find what is before a dropout and read by nobody else."""
        if not is_tensor(drop.x) or not shape(drop.x) or not isinstance(shape(drop.x)[-1], int):
            return
        wanted: dict[Node, int] = {drop.x: 1}
        inner: set[Node] = {drop.node}
        order = list(self.graph.nodes)
        for node in reversed(order[: order.index(drop.node)]):
            pieces = wanted.get(node, 0)
            if not pieces or node in self.mutated or not all(user in inner for user in node.users):
                continue
            if self._is_linear(node):
                if self._is_like(node, drop, pieces) and shape(node)[-1] == pieces * drop.n:
                    drop.members[node] = pieces
                    drop.layers.append(node)
                continue
            rule = rule_for(node)
            if rule is None or (is_tensor(node) and self._kind(node, drop, pieces) is None):
                continue
            operands = rule.operands(node, pieces)
            if operands is None or any(wanted.get(n, p) != p for n, p in operands):
                continue
            if any(p > 0 and is_tensor(n) and self._kind(n, drop, p) is None for n, p in operands):
                continue
            drop.members[node] = pieces
            inner.add(node)
            wanted.update(operands)

    def _is_like(self, node: Node, drop: Drop, pieces: int) -> bool:
        return self._kind(node, drop, pieces) == "values"

    def _kind(self, node: Node, drop: Drop, pieces: int) -> str | None:
        """How a tensor stands to the dropped one: one of its values, of its units, of its rows, or a number."""
        dims, n = shape(node), pieces * drop.n
        if dims and dims[-1] == n and _rows(dims) == _rows(shape(drop.x)):
            return "values"
        if math.prod(d for d in dims if isinstance(d, int)) == 1 and all(isinstance(d, int) for d in dims):
            return "number"
        if all(isinstance(d, int) and d == 1 for d in dims[:-1]) and dims[-1] == n:
            return "units"
        if isinstance(dims[-1], int) and dims[-1] == 1 and _rows(dims) == _rows(shape(drop.x)):
            return "rows"
        return None

    def source(self, node: Any) -> Drop | None:
        """The dropout that a node is made of by functions that keep zeros."""
        while isinstance(node, Node) and node not in self.drops:
            rule = rule_for(node)
            if node in self.mutated or rule is None or not rule.keeps_zero(node):
                return None
            operands = rule.operands(node, 1)
            if operands is None or len(operands) != 1:
                return None
            node = operands[0][0]
        return None if node in self.mutated else self.drops.get(node)

    # -- deciding

    def _decide(self, drop: Drop, uses: dict[Any, int]) -> None:
        site, x = drop.site, value(drop.x)
        number = uses.get(site, 0)
        uses[site] = number + 1
        dims = shape(drop.x)
        if drop.pair[0] == drop.pair[1] or not dims or not isinstance(dims[-1], int) or 0 in dims:
            return
        if x.device != value(drop.table).device:
            site.too_small = f"its input is on {x.device}, not where the model's first parameter is"
            return
        ask: Thresholds = site.policy.at(x.device, product_dtype(x.device, x.dtype))
        if (too_narrow := site.too_narrow(ask, dims)) is not None:
            site.too_small = too_narrow
            return
        if not all(self._can_name(shape(node)) for node in (drop.node, *drop.readers)):
            site.too_small = "sizes of the batch vary in a way that cannot be told"
            return
        if not drop.layers and not drop.readers:
            return
        if not drop.readers and (reason := ask.residual_sum(map(function_name, drop.node.users))):
            site.too_small = reason
            return
        before, after = (
            int(sum(map(self._multiplies, layers)) * site.rate) for layers in (drop.layers, drop.readers)
        )
        if (too_few := ask.compiled(before + after)) is not None:
            site.too_small = too_few
            return
        drop.packs_before = bool(drop.layers) and (ask.before_compiled(before) or not drop.readers)
        leading = tuple(_hint(d) for d in dims[:-1])
        drop.entry = drop.book.use(site, number, drop.n, leading, drop.pair, x.device)

    def _can_name(self, dims: tuple[Any, ...]) -> bool:
        return all(isinstance(d, int) or str(d.node.expr) in self._symbols for d in dims)

    def leading(self, node: Node) -> tuple[Any, ...]:
        """Leading shape of a node, of numbers and of nodes for what varies."""
        return tuple(d if isinstance(d, int) else self._symbols[str(d.node.expr)] for d in shape(node)[:-1])

    # -- emitting

    def _emit(self, drop: Drop) -> None:
        site = drop.site
        self._replaced.add(drop.node)
        if drop.entry is None:
            with self.graph.inserting_before(drop.node):
                new = self._native(drop)
            drop.node.replace_all_uses_with(new)
            return
        for reader in drop.readers:
            if not reader.users:  # a later dropout has taken it
                continue
            with self.graph.inserting_before(reader):
                new = self.layer(reader, None)
            reader.replace_all_uses_with(new)
            self._replaced.add(reader)
        self._sweep(but=drop.node)
        if drop.node.users:
            for reader in drop.node.users:
                site.read_whole(function_name(reader))
            with self.graph.inserting_before(drop.node):
                drop.node.replace_all_uses_with(self._dense(drop))
        self._sweep()

    def _native(self, drop: Drop) -> Node:
        site = drop.site
        if drop.pair[0] == drop.pair[1]:
            scale = 1 / (1 - site.rate) if site.scale_by == "rate" else 1.0
            return self.graph.call_function(torch.mul, (drop.x, scale))
        COUNTS.native += 1
        for reader in drop.node.users:
            site.read_whole(function_name(reader))
        return self.graph.call_function(F.dropout, (drop.x, site.rate, True, False))

    def _dense(self, drop: Drop) -> Node:
        """The dropout for those who read all of it."""
        entry = drop.live
        if drop.values is None and drop.packs_before:
            self.values(drop)
        if drop.values is not None and drop.packs_before:
            COUNTS.unpacked += 1
            args = (drop.values, drop.table, entry.use, entry.rows, self.leading(drop.node))
            return self.graph.call_function(packed.unpack, args)
        COUNTS.masked += 1
        return self.graph.call_function(packed.mask, (drop.x, drop.table, entry.use, entry.rows))

    def values(self, drop: Drop) -> Node:
        """The packed output of a dropout."""
        if drop.values is not None:
            return drop.values
        x, relu = drop.x, drop.packs_before and drop.x in drop.members and drop.x.target in RELU
        if relu:
            # relu(x) * scale = relu(x * scale): what is saved for the next product then serves relu's gradient, too.
            x = tensors(x)[0]
        with self.graph.inserting_before(drop.node):
            made = _Before(self, drop).operand(x, drop.node) if drop.packs_before else self._pack(drop)
        with self.graph.inserting_before(drop.node):
            drop.values = self.graph.call_function(packed.scaled, (made, drop.table, drop.live.use))
            if relu:
                drop.values = self.graph.call_function(torch.relu, (drop.values,))
        return drop.values

    def _pack(self, drop: Drop) -> Node:
        return self.graph.call_function(packed.pack, (drop.x, drop.table, drop.live.use, drop.live.rows))

    def layer(self, node: Node, outside: Drop | None, pieces: int = 1) -> Node:
        """A linear layer that reads kept inputs, computes kept outputs, or both; packed."""
        x = node.args[0]
        assert isinstance(x, Node)
        inside = self.source(x)
        if inside is not None and (inside.entry is None or not self._line_up(inside, outside, node)):
            inside = None
        some = inside or outside
        assert some is not None
        name = layer_name(node, some.book.names)
        with self.graph.inserting_before(node):
            if inside is not None:
                x = _After(self, inside).operand(x, node)
                inside.site.consumers.add(name)
                COUNTS.consumers += 1
            elif outside is not None and some.live.rows.pad and shape(x)[:-1] != shape(outside.node)[:-1]:
                x = self.graph.call_method("reshape", (x, *self.leading(outside.node), shape(x)[-1]))
        if outside is not None:
            outside.site.producers.add(name)
            COUNTS.producers += 1
        self._note(node, inside, outside)
        with self.graph.inserting_before(node):
            args = (
                x, self.weight(node), self.bias(node), some.table,
                inside.live.use if inside else None, outside.live.use if outside else None, some.live.rows, pieces,
                self.leading(node) if outside is None else None,
            )  # fmt: skip
            return self.graph.call_function(packed.linear, args)

    def _line_up(self, inside: Drop, outside: Drop | None, layer: Node) -> bool:
        """Whether one product can serve the patterns of a layer's inputs and outputs."""
        rows = inside.live.rows
        if outside is None:
            return True
        same_run = not rows.pad or shape(inside.node)[:-1] == shape(outside.node)[:-1]
        return rows == outside.live.rows and same_run and inside.table is outside.table

    def _note(self, node: Node, inside: Drop | None, outside: Drop | None) -> None:
        drop = inside or outside
        assert drop is not None
        multiplies = self._multiplies(node)
        drop.book.note(_key(node, drop.book), inside and inside.site, outside and outside.site, multiplies)

    def _sweep(self, but: Node | None = None) -> None:
        """Erase what was replaced and is read by nobody: of a graph with functions in place nothing else may go."""
        members = {n for drop in self.drops.values() if drop.entry is not None for n in drop.members}
        members |= {n for drop in self.drops.values() if drop.entry is not None for n in self._between(drop)}
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node is not but and (node in self._replaced or node in members):
                self.graph.erase_node(node)

    def _between(self, drop: Drop) -> set[Node]:
        """Nodes from a dropout to its readers."""
        found: set[Node] = set()
        for reader in drop.readers:
            node = reader.args[0] if reader.args else None  # erased ones have none
            while isinstance(node, Node) and node not in self.drops and node not in found:
                rule = rule_for(node)
                if rule is None or not rule.keeps_zero(node):
                    break
                found.add(node)
                node = node.args[0]
        return found


class _Before:
    """Packs what is before a dropout."""

    def __init__(self, rewriter: Rewriter, drop: Drop) -> None:
        self.rewriter, self.drop, self.graph = rewriter, drop, rewriter.graph
        self._made: dict[Node, Node] = {}

    def operand(self, node: Node, reader: Node) -> Node:
        drop, rewriter = self.drop, self.rewriter
        if node in self._made:
            return self._made[node]
        if node in drop.layers:
            new = rewriter.layer(node, drop, drop.members[node])
        elif node in drop.members:
            rule = rule_for(node)
            assert rule is not None
            new = rule.emit(node, self)
        else:
            return self._dense(node, reader)
        self._made[node] = new
        return new

    def _dense(self, node: Node, reader: Node) -> Node:
        drop, rewriter = self.drop, self.rewriter
        pieces = max(1, drop.members.get(reader, 1))
        use, rows = drop.live.use, drop.live.rows
        kind = rewriter._kind(node, drop, pieces)
        with self.graph.inserting_before(reader):
            if kind == "values":
                if rows.pad and shape(node)[:-1] != shape(drop.node)[:-1]:
                    node = self.graph.call_method("reshape", (node, *rewriter.leading(drop.node), shape(node)[-1]))
                return self.graph.call_function(packed.pack, (node, drop.table, use, rows, pieces))
            if kind == "units":
                return self.graph.call_function(packed.pack_units, (node, drop.table, use, pieces))
            if kind == "rows":
                return self.graph.call_function(packed.pack_rows, (node, rows))
        return node

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Node) -> Node:
        """As :class:`.rule.Packer` says."""
        with self.graph.inserting_before(like):
            create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
            return create(target, args, kwargs)


class _After(_Before):
    """Packs what is after it."""

    def operand(self, node: Node, reader: Node) -> Node:
        if node is self.drop.node:
            return self.rewriter.values(self.drop)
        rule = rule_for(node)
        assert rule is not None
        return rule.emit(node, self)


def _key(layer: Node, book: Book) -> str:
    """What tells a layer of the model from its others, in the graphs of all pairs and parts."""
    return f"{layer_name(layer, book.names)} {layer.name}"


def _rows(dims: tuple[Any, ...]) -> str:
    """Product of the leading sizes, comparable without making a guard of what is symbolic."""
    rows = math.prod(dims[:-1])
    return str(rows if isinstance(rows, int) else rows.node.expr)


def _hint(size: Any) -> int:
    """A size as it is now."""
    return size if isinstance(size, int) else int(size.node.hint)


def rewrite(gm: GraphModule) -> bool:
    """Rewrite a graph that Dynamo captured, and the graphs within it (as of checkpointed blocks), in place.

    Returns:
        Whether a dropout was in it.
    """
    inner = [rewrite(child) for child in gm.children() if isinstance(child, GraphModule)]
    if Rewriter(gm.graph).run():
        gm.recompile()
        return True
    return any(inner)
