"""Which layers a tensor was made by, for the report: nodes of the graph know their layer in the first steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from approxdrop_lightning.layers.linear import ApproxLinear

#: Key of the metadata of a node that computes the whole output of a layer: that layer.
_MADE_BY = "approxdrop_lightning"
#: A dropout is after a layer if so many nodes lie between them at most, none of which is a product of others.
_MOST_NODES = 16
_PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "ScaledDotProduct", "Embedding")


def note_layer(node: Any, layer: ApproxLinear) -> None:
    """Note that a node computes the whole output of a layer."""
    node.metadata[_MADE_BY] = layer


def read_whole_before(x: Tensor) -> dict[str, str]:
    """Layers that a tensor was made of by functions that read their waiting outputs whole.

    Args:
        x: An ordinary tensor.

    Returns:
        Name of each layer to that of the function, in PyTorch's words.
    """
    found: dict[str, str] = {}
    nodes, seen = [x.grad_fn], set[Any]()
    while nodes and len(seen) < _MOST_NODES:
        node = nodes.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        metadata: Any = node.metadata
        layer = metadata.get(_MADE_BY)
        if layer is not None and layer.read_whole_by:
            found[layer.name] = layer.read_whole_by
        elif not node.name().startswith(_PRODUCTS):
            nodes += [before for before, _ in node.next_functions]
    return found
