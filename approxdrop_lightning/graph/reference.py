"""The definition of the pass: each dropout of the captured graph as a mask of the pattern that the pass gives it."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from approxdrop_lightning.graph.counts import COUNTS
from approxdrop_lightning.graph.emit import without_pattern
from approxdrop_lightning.graph.layout import Rows, TableUse, mask_of
from approxdrop_lightning.graph.rewrite import analysed


def mask(gm: GraphModule, recomputed: bool = False) -> None:
    """Replace the dropouts of a graph and of its subgraphs by masks, in place.

    A dropout that stays conventional is the same here.
    """
    for child in gm.children():
        if isinstance(child, GraphModule):
            mask(child, recomputed=True)
    dropouts = analysed(gm.graph, recomputed)
    if dropouts is None:
        return
    for drop in dropouts.drops.values():
        with gm.graph.inserting_before(drop.node):
            if drop.entry is None:
                new = without_pattern(dropouts, drop)
            else:
                new = gm.graph.call_function(_masked, (drop.x, drop.table, drop.entry.use, drop.entry.rows))
        drop.node.replace_all_uses_with(new)
        gm.graph.erase_node(drop.node)
    gm.recompile()
    COUNTS.graphs += 1


def _masked(x: Tensor, table: Tensor, use: TableUse, rows: Rows) -> Tensor:
    return x * mask_of(use, table, rows, tuple(x.shape[:-1]), x.dtype)
