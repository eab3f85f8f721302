"""Module names of graph nodes, for the report."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch.fx import Node


def layer_name(node: Node, names: Mapping[str, str]) -> str:
    """Name of the module that a node comes from; without one, name of its function.

    Args:
        node: The node.
        names: Names of the modules by ``id``, as in Dynamo's ``nn_module_stack``.
    """
    return module_name(node, names) or function_name(node)


def layer_key(node: Node, names: Mapping[str, str]) -> str:
    """Identifies a layer of the model among all layers, in the graphs of all pairs and parts of the model."""
    return f"{layer_name(node, names)} {node.name}"


def module_name(node: Node, names: Mapping[str, str]) -> str:
    """Name of the module that a node comes from; empty if it is the model itself or unknown."""
    stack: dict[str, tuple[str, type]] = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path, _ = next(reversed(stack.values()))
    known = names.get(module_ids(node)[0])
    return re.sub(r"^L\['\w+'\]\.?", "", path) if known is None else known


def module_ids(node: Node) -> list[str]:
    """``id`` of each module whose code calls the function of a node, from the innermost one on."""
    return [re.sub(r"\D.*", "", key) for key in reversed(node.meta.get("nn_module_stack") or {})]


def function_name(node: Node) -> str:
    """Name of the function that a node calls."""
    if node.op == "output":
        return "the end of the graph"
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
