"""The pass: ``linear -> elementwise* -> dropout -> elementwise* -> linear`` becomes products of kept units.

It works on the graph that Dynamo captured, before autograd is traced, so only the forward pass is rewritten. It has
three steps:

1. Find (:mod:`.find`) the layers around each dropout, by data flow through functions that :mod:`.rules` know. A
   *producer* is a layer that nothing but the dropout reads: only kept outputs are computed. A *consumer* reads the
   dropout through functions that map zero to zero: only kept inputs are multiplied.
2. Decide (:mod:`.decide`) whether skipping gains. If not, PyTorch's own dropout runs.
3. Emit (:mod:`.emit`) the packed products.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule

from approxdrop_lightning.graph.concatenations import split_concatenations
from approxdrop_lightning.graph.counts import COUNTS
from approxdrop_lightning.graph.decide import decide
from approxdrop_lightning.graph.emit import Emitter
from approxdrop_lightning.graph.find import Dropouts
from approxdrop_lightning.graph.functional import functional_dropout
from approxdrop_lightning.graph.names import layer_key, module_name
from approxdrop_lightning.graph.nodes import multiplies


def rewrite(gm: GraphModule, recomputed: bool = False) -> bool:
    """Rewrite a graph that Dynamo captured, and its subgraphs, in place.

    Args:
        gm: The graph.
        recomputed: Whether it is a subgraph, of a checkpointed block.

    Returns:
        Whether it contained a dropout.
    """
    inner = [rewrite(child, recomputed=True) for child in gm.children() if isinstance(child, GraphModule)]
    dropouts = analysed(gm.graph, recomputed)
    if dropouts is None:
        return any(inner)
    Emitter(dropouts).run()
    gm.graph.lint()
    gm.recompile()
    COUNTS.graphs += 1
    return True


def analysed(graph: Graph, recomputed: bool = False) -> Dropouts | None:
    """The dropouts of a graph with their layers and decisions, concatenations being split; None if there are none."""
    dropouts = Dropouts(graph, recomputed)
    if not dropouts.drops:
        return None
    split_concatenations(dropouts)
    _report(dropouts)
    dropouts.find_layers()
    decide(dropouts)
    return dropouts


def _report(dropouts: Dropouts) -> None:
    """Note all layers for the report, which the emitted ones replace, and functional dropouts, which stay."""
    book = next(iter(dropouts.drops.values())).book
    for node in dropouts.graph.nodes:
        if count := multiplies(node):
            book.note(layer_key(node, book.names), None, None, count)
        if (found := functional_dropout(node)) is not None:
            rate, place, reason = found
            book.left(f"{module_name(node, book.names) or 'the model'} ({place})", rate, reason)
