"""What the pass must equal: the captured graph, each dropout a mask of the pattern that the pass would give it."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from approxdrop_lightning.graph.layout import Rows, TableUse, mask_of
from approxdrop_lightning.graph.rewrite import Drop, Rewriter


class Masking(Rewriter):
    """Masks in the place of packed products; what the pass leaves to native dropout is native here as well."""

    def _emit(self, drop: Drop) -> None:
        with self.graph.inserting_before(drop.node):
            if drop.entry is None:
                new = self._native(drop)
            else:
                new = self.graph.call_function(_masked, (drop.x, drop.table, drop.entry.use, drop.entry.rows))
        drop.node.replace_all_uses_with(new)

    def _sweep(self, but: Node | None = None) -> None:
        for node in self.drops:
            self.graph.erase_node(node)


def mask(gm: GraphModule) -> None:
    """Make masks of the dropouts of a graph, and of the graphs within it, in place."""
    for child in gm.children():
        if isinstance(child, GraphModule):
            mask(child)
    Masking(gm.graph).run()
    gm.recompile()


def _masked(x: Tensor, table: Tensor, use: TableUse, rows: Rows) -> Tensor:
    return x * mask_of(use, table, rows, tuple(x.shape[:-1]), x.dtype)
