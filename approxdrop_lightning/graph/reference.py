"""The definition of the pass: each dropout of the captured graph as a mask of the pattern that the pass gives it."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from approxdrop_lightning.graph.emit import without_pattern
from approxdrop_lightning.graph.find import Dropouts
from approxdrop_lightning.graph.layout import Rows, TableUse, mask_of
from approxdrop_lightning.graph.rewrite import replace_dropouts


def mask(gm: GraphModule) -> None:
    """Replace the dropouts of a graph and of its subgraphs by masks, in place.

    A dropout that stays conventional is the same here.
    """
    replace_dropouts(gm, _replace)


def _replace(dropouts: Dropouts) -> None:
    graph = dropouts.graph
    for drop in dropouts.drops.values():
        with graph.inserting_before(drop.node):
            if drop.entry is None:
                new = without_pattern(dropouts, drop)
            else:
                new = graph.call_function(_masked, (drop.x, drop.table, drop.entry.use, drop.entry.rows))
        drop.node.replace_all_uses_with(new)
        graph.erase_node(drop.node)


def _masked(x: Tensor, table: Tensor, use: TableUse, rows: Rows) -> Tensor:
    return x * mask_of(use, table, rows, tuple(x.shape[:-1]), x.dtype)
