"""The interface of rules, and queries about nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node


class Packer(Protocol):
    """Emits nodes that compute packed values."""

    def operand(self, node: Node, reader: Node) -> Node:
        """The packed form of ``node``, an input of ``reader``."""

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Node) -> Node:
        """A new node before ``like``; ``target`` is a function, or the name of a method."""


class Rule:
    """How one kind of node is computed for kept units only."""

    #: Functions, and names of methods.
    targets: frozenset[Any] = frozenset()

    def fits(self, node: Node) -> bool:
        """Whether the rule is for this kind of node."""
        return node.op in ("call_function", "call_method") and node.target in self.targets

    def operands(self, node: Node, chunks: int) -> list[tuple[Node, int]] | None:
        """Inputs to be packed.

        Args:
            node: The node.
            chunks: Number of chunks of ``n`` units in its last dimension; more than one before gates are split.

        Returns:
            Each input with its number of chunks; None if the node cannot be computed from packed inputs.
        """
        raise NotImplementedError

    def keeps_zero(self, node: Node) -> bool:
        """Whether it has a single packed input and is zero wherever that is zero."""
        return False

    def emit(self, node: Node, packer: Packer) -> Node:
        """Emit the node for packed inputs."""
        raise NotImplementedError


def value(node: Any) -> Any:
    """The fake value of a node; None if it is not known."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else None


def is_tensor(node: Any) -> bool:
    """Whether a node's value is a tensor."""
    return isinstance(value(node), Tensor)


def shape(node: Node) -> tuple[Any, ...]:
    """Shape of a node's tensor, possibly with symbolic sizes."""
    return tuple(value(node).shape)


def tensors(node: Node) -> list[Node]:
    """The inputs of a node that are tensors."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def overloads(*names: str) -> frozenset[Any]:
    """All targets by which graphs call a function: its variants in PyTorch's namespaces, and the method's name."""
    homes: tuple[Any, ...] = (F, torch, torch._C._nn, torch.special)
    found: set[Callable[..., Any] | str] = set(names)
    for name in names:
        found |= {getattr(home, name) for home in homes if hasattr(home, name)}
    return frozenset(found)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_last(dim: Any, node: Node) -> bool:
    """Whether ``dim`` is the last dimension of a node."""
    return isinstance(dim, int) and dim in (-1, len(shape(node)) - 1)
