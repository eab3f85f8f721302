"""What a rule is, and what rules know of nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node


class Packer(Protocol):
    """Emits nodes for packed values."""

    def operand(self, node: Node, reader: Node) -> Node:
        """The packed form of what ``reader`` reads."""

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Node) -> Node:
        """A new node in the place of ``like``, of its kind (function or method)."""


class Rule:
    """How one kind of node is computed of kept units alone."""

    #: Functions, and names of methods.
    targets: frozenset[Any] = frozenset()

    def fits(self, node: Node) -> bool:
        """Whether the rule is about this node."""
        return node.op in ("call_function", "call_method") and node.target in self.targets

    def operands(self, node: Node, pieces: int) -> list[tuple[Node, int]] | None:
        """What must be packed for it, and of how many runs of ``n`` units each is; None: the rule does not fit."""
        raise NotImplementedError

    def keeps_zero(self, node: Node) -> bool:
        """Whether it has one packed input, and is zero where that is."""
        return False

    def emit(self, node: Node, packer: Packer) -> Node:
        """The node of packed values."""
        raise NotImplementedError


def value(node: Any) -> Any:
    """The fake value of a node, if it is known."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else None


def is_tensor(node: Any) -> bool:
    """Whether a node's value is a tensor."""
    return isinstance(value(node), Tensor)


def shape(node: Node) -> tuple[Any, ...]:
    """Shape of a node's tensor; sizes may be symbolic."""
    return tuple(value(node).shape)


def tensors(node: Node) -> list[Node]:
    """Inputs of a node that are tensors."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def overloads(*names: str) -> frozenset[Any]:
    """The forms of each function in graphs: functions of PyTorch's, and methods by name."""
    homes: tuple[Any, ...] = (F, torch, torch._C._nn, torch.special)
    found: set[Callable[..., Any] | str] = set(names)
    for name in names:
        found |= {getattr(home, name) for home in homes if hasattr(home, name)}
    return frozenset(found)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_last(dim: Any, node: Node) -> bool:
    """Whether ``dim`` is a node's last dimension."""
    return isinstance(dim, int) and dim in (-1, len(shape(node)) - 1)
