"""Tensors of a graph that are changed in place: their values depend on when they are read."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from approxdrop_lightning.graph.rules.rule import argument, is_tensor, overloads, tensors

_OPERATORS = frozenset({
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.iand, operator.ior,
    operator.ixor, operator.ifloordiv, operator.imod, operator.imatmul, operator.setitem,
})  # fmt: skip
_VIEWS = overloads(
    "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "chunk", "split", "transpose", "permute", "t",
    "expand", "narrow", "select", "unbind", "contiguous", "view_as", "reshape_as", "expand_as", "detach", "swapaxes",
    "movedim", "diagonal", "to", "float", "double", "type_as", "movedim", "T", "mT",
) | {operator.getitem, getattr}  # fmt: skip
_BY_POSITION: dict[str, int] = {
    "relu": 1,
    "silu": 1,
    "mish": 1,
    "hardswish": 1,
    "relu6": 1,
    "leaky_relu": 2,
    "elu": 2,
    "dropout": 3,
}


def changed_by(node: Node) -> list[Node]:
    """Inputs that a node changes in place."""
    if node.op not in ("call_function", "call_method"):
        return []
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    changed: list[Any] = []
    in_place = node.kwargs.get(
        "inplace", argument(node, _BY_POSITION[name], "inplace") if name in _BY_POSITION else None
    )
    if node.target in _OPERATORS or in_place is True or (name.endswith("_") and not name.endswith("__")):
        changed.append(node.args[0] if node.args else node.kwargs.get("input"))
    out = node.kwargs.get("out")
    changed += out if isinstance(out, (tuple, list)) else [out]
    return [n for n in changed if isinstance(n, Node)]


def mutated(graph: Graph) -> set[Node]:
    """Tensors that are changed in place while others may read them, and all that may share their memory.

    A tensor whose only reader changes it, as in ``relu(linear(x), inplace=True)``, does not count.
    """
    found: set[Node] = set()
    for node in graph.nodes:
        for target in changed_by(node):
            if len(target.users) > 1 or target.op == "placeholder" or target.target in _VIEWS:
                found |= _aliases(target)
                found.add(node)
    return found


def _aliases(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        at = waiting.pop()
        if at in found:
            continue
        found.add(at)
        if at.target in _VIEWS or changed_by(at):
            waiting += (tensors(at) or at.all_input_nodes)[:1]
        waiting += [user for user in at.users if user.target in _VIEWS or at in changed_by(user)]
    return {n for n in found if is_tensor(n) or n.target in _VIEWS}
