"""Views that reshape or permute the leading dimensions only: the last one stays."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from approxdrop_lightning.graph.rules.rule import Packer, Rule, is_tensor, overloads, shape, tensors


class View(Rule):
    """``view``, ``reshape`` and the like: a no-op on packed values, whose rows are in one dimension."""

    targets = overloads("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as")

    def operands(self, node: Node, chunks: int) -> list[tuple[Node, int]] | None:
        return [(tensors(node)[0], chunks)] if self._of_rows(node) else None

    def keeps_zero(self, node: Node) -> bool:
        return self._of_rows(node)

    def emit(self, node: Node, packer: Packer) -> Node:
        return packer.operand(tensors(node)[0], node)

    def _of_rows(self, node: Node) -> bool:
        if not is_tensor(node) or not tensors(node):
            return False
        before, after = shape(tensors(node)[0]), shape(node)
        if not before or not after or not isinstance(before[-1], int) or not isinstance(after[-1], int):
            return False
        return before[-1] == after[-1]


class Whole(View):
    """A slice of all of a tensor, such as ``x[..., :n]`` with ``n`` units."""

    targets = frozenset({operator.getitem})

    def fits(self, node: Node) -> bool:
        """As :meth:`.Rule.fits`."""
        if not super().fits(node) or not is_tensor(node) or not is_tensor(node.args[0]):
            return False
        source, index = node.args
        assert isinstance(source, Node)
        parts = index if isinstance(index, tuple) else (index,)
        return shape(source) == shape(node) and all(part is Ellipsis or isinstance(part, slice) for part in parts)


class Transpose(View):
    """``transpose``, ``permute`` and the like.

    A no-op too, because packed rows are always in the order of the dropout: dense tensors are transposed before they
    are packed (:attr:`.find.Drop.orders`), and the dense outputs of consumers afterwards.
    """

    targets = overloads("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis")

    def _of_rows(self, node: Node) -> bool:
        if not is_tensor(node) or node.all_input_nodes != tensors(node)[:1] or node.args[:1] != (tensors(node)[0],):
            return False
        sizes = range(2, 2 + len(shape(node)))  # all different
        probe = torch.empty(tuple(sizes), device="meta")
        call = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
        moved = call(probe, *node.args[1:], **node.kwargs)
        return bool(sizes) and moved.shape[-1] == sizes[-1]
