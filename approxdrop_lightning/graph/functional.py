"""Dropouts of a graph that are function calls: ``F.dropout`` becomes the operator of a site, as ``nn.Dropout`` is.

A call has no module that could say for which ``(dp, keep)`` a graph is compiled. It therefore has one pair for all
steps, which drops exactly its rate. The units are drawn anew in each step, like those of all other dropouts.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.source import ConstantSource
from torch.fx import Graph, GraphModule, Node

from approxdrop_lightning.graph.book import Book, book_of
from approxdrop_lightning.graph.guards import Frame
from approxdrop_lightning.graph.mutation import mutated
from approxdrop_lightning.graph.names import module_ids
from approxdrop_lightning.graph.operator import DROP
from approxdrop_lightning.graph.rules.rule import argument, overloads

_DROPOUT = overloads("dropout", "dropout_")
_ATTENTION = F.scaled_dot_product_attention
_TORCH = str(Path(torch.__file__).parent)


class Tables:
    """Gives a graph the tables of patterns.

    Args:
        gm: The graph.
        outer: The graph that calls it, with its calls; None if Dynamo's code does.
    """

    def __init__(self, gm: GraphModule, outer: tuple[Tables, list[Node]] | None = None) -> None:
        self.gm, self.graph, self.outer = gm, gm.graph, outer
        self._made: dict[Node, tuple[Book, str]] = {}

    def node(self, book: Book) -> Node:
        """The table of a model: an input of the graph, or else a buffer, of which AOTAutograd makes an input."""
        table, name = book.table(book.device), f"approxdrop_table_{book.serial}"
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node in (*inputs, *self._made):
            if self._made.get(node) == (book, name) or _input(node) is table:
                return node
        if self.outer is None:
            self.gm.register_buffer(name, table, persistent=False)
            if (sources := getattr(self.gm, "_param_name_to_source", None)) is not None:
                sources[name] = ConstantSource(name)
        else:
            outer, calls = self.outer
            given = outer.node(book)
            for call in calls:
                call.args = (*call.args, given)
        with self.graph.inserting_after(inputs[-1]):
            node = self.graph.get_attr(name) if self.outer is None else self.graph.placeholder(name)
        node.meta["example_value"] = table
        self._made[node] = book, name
        return node

    def sweep(self) -> None:
        """Remove buffers that nothing reads."""
        for node, (_, name) in self._made.items():
            if not node.users and self.outer is None:
                self.graph.erase_node(node)
                delattr(self.gm, name)


def _input(node: Node) -> Any:
    """The tensor for which Dynamo has made an input of a graph."""
    return getattr(node.meta.get("grapharg"), "example", None)


@dataclass(frozen=True, eq=False)
class Call:
    """A functional dropout of a graph.

    Attributes:
        node: Its node.
        rate: Its rate, > 0; None if the graph does not fix it.
        book: Patterns of the model that calls it.
        module: The module in whose code it is; None if it is in other code.
        name: Name for the report: that of the module, and ``file:line``.
    """

    node: Node
    rate: float | None
    book: Book
    module: nn.Module | None
    name: str


class FunctionalDropouts:
    """The functional dropouts of a graph. Those that may skip are replaced by :func:`.operator.drop`.

    Args:
        graph: The graph.
        tables: Gives it the tables of patterns; None: nothing can.
    """

    def __init__(self, graph: Graph, tables: Tables | None) -> None:
        self.graph, self.tables = graph, tables
        self._books: set[Book] = set()  # of its calls
        self._drawn: dict[tuple[Book, nn.Module | None], bool] = {}  # whether it needs patterns for a module's calls
        self._replaced: dict[Call, Any] = {}  # with its site
        nodes = [node for node in graph.nodes if functional_dropout(node) is not None]
        # Without Dynamo, nothing tells when a graph may run.
        self._frame = Frame.current(_is_known) if nodes else None
        if self._frame is None or not self._frame.roots:
            return
        shared = mutated(graph)
        for node in nodes:
            call = self._call(node, self._frame)
            if call is None:
                continue
            if node.target is _ATTENTION:
                call.book.calls.left(call.name, call.rate, "dropout inside attention is left as it is")
                continue
            self._books.add(call.book)
            if not call.book.calls.are_drawn(call.module):
                self._drawn[call.book, call.module] = False
            elif (reason := self._against(call, shared) or self._replace(call)) is not None:
                call.book.calls.left(call.name, call.rate, reason)

    def _call(self, node: Node, frame: Frame) -> Call | None:
        """A call with its model; None if no converted model calls it, or several may."""
        rate, place = functional_dropout(node) or (None, "")
        for key in module_ids(node):
            if (book := book_of(key)) is not None:
                module = book.calls.module(key)
                break
        else:  # the graph does not name the module whose code Dynamo captures
            roots = {id(root): root for root in frame.roots.values()}
            books = [book for key in roots if (book := book_of(str(key))) is not None]
            if len(set(books)) != 1:
                return None
            book, module = books[0], next(iter(roots.values())) if len(roots) == 1 else None
        name = book.calls.names.get(str(id(module))) or "the model"
        return Call(node, rate, book, module, f"{name} ({place})")

    def _against(self, call: Call, shared: set[Node]) -> str | None:
        """Why a call stays as it is, whatever is around it; None if nothing is against replacing it."""
        if call.rate is None:
            return "its rate changes from step to step"
        if call.rate >= 1:
            return "it drops everything"
        if call.node in shared:
            return "it works in place on a tensor that others read"
        if self.tables is None:
            return "it runs under an operator with a graph of its own"
        return None

    def _replace(self, call: Call) -> str | None:
        """Replace a call; the reason if there is no site for it."""
        assert self.tables is not None and call.rate is not None
        site = call.book.calls.site(call.name, call.rate)
        if isinstance(site, str):
            return site
        dp, keep = call.book.pair(site)
        table = self.tables.node(call.book)
        with self.graph.inserting_before(call.node):
            arguments = argument(call.node, 0, "input"), table, call.book.key(site), dp, keep
            new = self.graph.call_function(DROP[0], arguments)
        new.meta = dict(call.node.meta)
        call.node.replace_all_uses_with(new)
        self.graph.erase_node(call.node)
        self._replaced[call] = site
        return None

    def finish(self) -> None:
        """Let the graph run only for the modules and in the state for which it was compiled."""
        if self._frame is None or not self._books:
            return
        for call, site in self._replaced.items():
            if True in site.in_graphs:  # otherwise it is native, whether patterns are drawn or not
                self._drawn[call.book, call.module] = True
        conditions = [_unchanged(book) for book in self._books]
        conditions += [_drawn(book, module, drawn) for (book, module), drawn in self._drawn.items()]
        self._frame.guard_identity()
        self._frame.guard(
            lambda: all(holds() for holds in conditions), "patterns of functional dropouts are as before"
        )


def _drawn(book: Book, module: nn.Module | None, expected: bool) -> Callable[[], bool]:
    """The condition that patterns are, or are not, drawn for calls in the code of a module."""
    ref, owner = weakref.ref(book), None if module is None else weakref.ref(module)

    def holds() -> bool:
        now, code = ref(), None if owner is None else owner()
        is_gone = now is None or (owner is not None and code is None)
        return (now is not None and not is_gone and now.calls.are_drawn(code)) == expected

    return holds


def _unchanged(book: Book) -> Callable[[], bool]:
    """The condition that a conversion has not ended and its table is still the same."""
    ref, device = weakref.ref(book), book.device
    table = book.tables.get(device)

    def holds() -> bool:
        now = ref()
        return now is not None and not now.calls.is_closed and now.tables.get(device) is table

    return holds


def _is_known(module: nn.Module) -> bool:
    return book_of(str(id(module))) is not None


def functional_dropout(node: Node) -> tuple[float | None, str] | None:
    """Rate (None if the graph does not fix it) and ``"file:line"`` of a functional dropout; None for other nodes.

    Dropout inside attention counts. Calls from PyTorch's own modules are left out: the report has rows for these.
    """
    if node.op != "call_function" or not (node.target in _DROPOUT or node.target is _ATTENTION):
        return None
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    if modules and modules[-1][1].__module__.startswith(("torch.", "approxdrop_lightning.")):
        return None
    if node.target is _ATTENTION:
        rate = argument(node, 4, "dropout_p", 0.0)
    else:
        training = argument(node, 2, "training", node.kwargs.get("train", True))
        rate = argument(node, 1, "p", 0.5) if training else 0.0
    place = _place(node)
    if not place or (not isinstance(rate, Node) and rate <= 0):
        return None
    return None if isinstance(rate, Node) else rate, place


def _place(node: Node) -> str:
    calls = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in calls if not file.startswith(_TORCH)]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""
