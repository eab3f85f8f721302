"""Entry points of the pass: inductor's pre-grad hook for plain ``torch.compile``, and the backend ``approxdrop``."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path
from typing import Any

import torch._dynamo.config as dynamo
import torch._inductor.config as inductor
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from approxdrop_lightning.graph.book import Book
from approxdrop_lightning.graph.guards import is_subgraph
from approxdrop_lightning.graph.rewrite import rewrite


class Pass(CustomGraphPass):
    """The pass as a hook of inductor, which runs after the hook that was set before."""

    def __init__(self, before: Any = None) -> None:
        self.before = before

    def __call__(self, graph: Graph) -> None:
        befores = self.before if isinstance(self.before, (tuple, list)) else (self.before,)
        for other in befores:
            if other is not None:
                other(graph)
        gm = graph.owning_module
        # Inductor passes subgraphs first, but those that get the tables of patterns are rewritten with their graph.
        if gm is not None and not is_subgraph(gm):
            rewrite(gm)

    def uuid(self) -> Any:
        """Key of the pass for inductor's cache of compiled graphs."""
        files = sorted(Path(__file__).parent.rglob("*.py"))
        own = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        other = getattr(self.before, "uuid", None)
        return own if self.before is None else (own, other() if other else repr(self.before))


class _Charge:
    """Settings of PyTorch that are changed while a converted model exists."""

    def __init__(self) -> None:
        self._graphs: dict[int, int] = {}  # most graphs per shape, by serial number of the book
        self._pass: Pass | None = None
        self._limits: tuple[int, int] | None = None  # found, set
        self._timing: Any = None

    def take(self, book: Book) -> None:
        """A model is converted: change the settings, until its book is gone at the latest."""
        self._graphs[book.serial] = book.graphs
        weakref.finalize(book, self.give, book.serial)
        if not isinstance(inductor.pre_grad_custom_pass, Pass):  # a pass of the user's runs before ours
            self._pass = Pass(inductor.pre_grad_custom_pass)
            inductor.pre_grad_custom_pass = self._pass
        if hasattr(inductor, "pre_grad_pass_timing") and inductor.pre_grad_pass_timing != "early":
            # Before the lookup in the cache of compiled graphs: graphs found there need their patterns entered too.
            self._timing, inductor.pre_grad_pass_timing = inductor.pre_grad_pass_timing, "early"
        found = self._limits[0] if self._limits else dynamo.recompile_limit
        # Two batch sizes; and twice that, because graphs of earlier models of the same class count as well.
        wanted = max(found + 4 * sum(self._graphs.values()), dynamo.recompile_limit)
        self._limits = (found, wanted)
        dynamo.recompile_limit = wanted

    def give(self, serial: int) -> None:
        """A model is restored: put settings back, except for those that were changed by others since."""
        if self._graphs.pop(serial, None) is None or self._graphs:
            return
        if self._pass is not None and inductor.pre_grad_custom_pass is self._pass:
            inductor.pre_grad_custom_pass = self._pass.before
        if self._timing is not None:
            inductor.pre_grad_pass_timing = self._timing
        if self._limits is not None and dynamo.recompile_limit == self._limits[1]:
            dynamo.recompile_limit = self._limits[0]
        self._pass = self._limits = self._timing = None


CHARGE = _Charge()


def approxdrop(gm: GraphModule, inputs: list[Tensor], *, mode: str | None = None, options: Any = None) -> Any:
    """The backend ``approxdrop`` of ``torch.compile``: the pass, then inductor."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    rewrite(gm)
    return compile_fx(gm, inputs, config_patches=patches or None)
