"""The pass: ``linear -> elementwise* -> dropout -> elementwise* -> linear`` becomes products of kept units.

It works on the graph that Dynamo captured, before autograd is traced, so only the forward pass is rewritten. Calls of
``F.dropout`` first become the operator to which ``nn.Dropout`` is traced (:mod:`.functional`). Three steps follow:

1. Find (:mod:`.find`) the layers around each dropout, by data flow through functions that :mod:`.rules` know. A
   *producer* is a layer that nothing but the dropout reads: only kept outputs are computed. A *consumer* reads the
   dropout through functions that map zero to zero: only kept inputs are multiplied.
2. Decide (:mod:`.decide`) whether skipping gains. If not, PyTorch's own dropout runs.
3. Emit (:mod:`.emit`) the packed products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from approxdrop_lightning.graph.concatenations import split_concatenations
from approxdrop_lightning.graph.counts import COUNTS
from approxdrop_lightning.graph.decide import decide
from approxdrop_lightning.graph.emit import Emitter
from approxdrop_lightning.graph.find import Dropouts
from approxdrop_lightning.graph.functional import FunctionalDropouts, Tables
from approxdrop_lightning.graph.names import layer_key
from approxdrop_lightning.graph.nodes import multiplies
from approxdrop_lightning.graph.stacks import take_stacks_apart

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def rewrite(gm: GraphModule) -> bool:
    """Rewrite a graph that Dynamo captured, and its subgraphs (of checkpointed blocks), in place.

    Returns:
        Whether it contained a dropout of a converted model.
    """
    return replace_dropouts(gm, lambda dropouts: Emitter(dropouts).run())


def replace_dropouts(gm: GraphModule, replace: Callable[[Dropouts], None]) -> bool:
    """Analyse a graph and its subgraphs, and replace their dropouts in place.

    Args:
        gm: The graph.
        replace: Called with the dropouts of each graph that has any, with their layers and decisions.

    Returns:
        Whether there were dropouts.
    """
    return _replace_in(gm, Tables(gm), replace, Counter())


def _replace_in(
    gm: GraphModule,
    tables: Tables | None,
    replace: Callable[[Dropouts], None],
    uses: Counter[Any],
    recomputed: bool = False,
) -> bool:
    found = False
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            calls = [n for n in gm.graph.nodes if n.target is _CHECKPOINT and n.args[0].target == name]
            inner = Tables(child, (tables, calls)) if tables is not None and calls else None
            found |= _replace_in(child, inner, replace, uses, recomputed=True)
    functional = FunctionalDropouts(gm.graph, tables)
    dropouts = Dropouts(gm.graph, recomputed)
    if dropouts.drops:
        take_stacks_apart(dropouts)
        split_concatenations(dropouts)
        _note_layers(dropouts)
        dropouts.find_layers()
        decide(dropouts, uses)
        replace(dropouts)
        found = True
        COUNTS.graphs += 1
    functional.finish()
    if tables is not None:
        tables.sweep()
    if found:
        gm.graph.lint()
        gm.recompile()
    return found


def _note_layers(dropouts: Dropouts) -> None:
    """Note all layers for the report; emitted ones will replace them."""
    book = next(iter(dropouts.drops.values())).book
    for node in dropouts.graph.nodes:
        if count := multiplies(node):
            book.note(layer_key(node, book.calls.names), None, None, count)
