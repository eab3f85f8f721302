"""Views that rearrange the leading dimensions and leave the last one: rows stay rows, in their order."""

from __future__ import annotations

import operator

from torch.fx import Node

from approxdrop_lightning.graph.rules.rule import Packer, Rule, is_tensor, overloads, shape, tensors


class View(Rule):
    """``view``, ``reshape`` and the like. Packed values have their rows in one dimension: nothing is to be done."""

    targets = overloads("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as")

    def operands(self, node: Node, pieces: int) -> list[tuple[Node, int]] | None:
        return [(tensors(node)[0], pieces)] if self._of_rows(node) else None

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
    """A slice that takes all of a tensor, as ``x[..., :n]`` of ``n`` units."""

    targets = frozenset({operator.getitem})

    def fits(self, node: Node) -> bool:
        """Whether it is one."""
        if not super().fits(node) or not is_tensor(node) or not is_tensor(node.args[0]):
            return False
        source, index = node.args
        assert isinstance(source, Node)
        parts = index if isinstance(index, tuple) else (index,)
        return shape(source) == shape(node) and all(part is Ellipsis or isinstance(part, slice) for part in parts)
