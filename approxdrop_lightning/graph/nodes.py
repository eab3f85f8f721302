"""Linear layers and other products among the nodes of a graph, and how many multiplies they take."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from approxdrop_lightning.graph.rules.rule import argument, is_tensor, shape, value

CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d})
LINEAR = frozenset({F.linear, torch._C._nn.linear})


def is_linear(node: Node) -> bool:
    """Whether a node is a linear layer with a two-dimensional weight."""
    if node.op != "call_function" or node.target not in LINEAR or not is_tensor(node) or not node.args:
        return False
    return len(shape(weight(node))) == 2


def weight(layer: Node) -> Node:
    """Weight of a linear layer, ``[n_out, n_in]``."""
    return argument(layer, 1, "weight")


def bias(layer: Node) -> Node | None:
    """Bias of a linear layer."""
    return argument(layer, 2, "bias")


def multiplies(node: Node) -> int:
    """Multiplies of a layer in the forward pass; 0 for nodes that are not counted."""
    if is_linear(node):
        return hint(math.prod(shape(node)[:-1])) * value(weight(node)).numel()
    if node.op == "call_function" and node.target in CONVOLUTIONS and is_tensor(node):
        kernel = shape(argument(node, 1, "weight"))[1:]
        return hint(math.prod(shape(node))) * math.prod(kernel)
    if node.target is F.scaled_dot_product_attention and is_tensor(node):
        length = shape(argument(node, 1, "key"))[-2]
        return 2 * hint(math.prod(shape(node))) * hint(length)
    if node.target is F.multi_head_attention_forward:
        inputs = [shape(n) for n in node.args[:3] if isinstance(n, Node)]
        if len(inputs) == 3:
            query, key, entries = map(math.prod, inputs)
            width, length = inputs[0][-1], inputs[1][0]
            return hint(2 * query * width + (key + entries) * width + 2 * query * length)
    return 0


def rows(dims: tuple[Any, ...]) -> str:
    """Product of the leading sizes, as text: comparing symbolic sizes would add a guard."""
    product = math.prod(dims[:-1])
    return str(product if isinstance(product, int) else product.node.expr)


def hint(size: Any) -> int:
    """The current value of a size that may be symbolic."""
    return size if isinstance(size, int) else int(size.node.hint)
