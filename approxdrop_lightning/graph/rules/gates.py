"""Gated units: a layer computes gates and values as chunks of its outputs; the same units are kept in each chunk."""

from __future__ import annotations

import operator

from torch.fx import Node

from approxdrop_lightning.graph.rules.rule import Packer, Rule, argument, is_last, is_tensor, overloads, shape, value


def _count(node: Node) -> int | None:
    """Number of equal chunks into which a node splits the last dimension of its input; None if it does not."""
    source = node.args[0]
    if not isinstance(source, Node) or not is_tensor(source) or not isinstance(value(node), (tuple, list)):
        return None
    dim = argument(node, 2, "dim", 0)
    widths = {part.shape[-1] for part in value(node)}
    return len(value(node)) if is_last(dim, source) and len(widths) == 1 else None


class ChunkItem(Rule):
    """One of the chunks: ``chunk(x, 2, -1)[0]``."""

    targets = frozenset({operator.getitem})

    def operands(self, node: Node, chunks: int) -> list[tuple[Node, int]] | None:
        source, index = node.args
        if chunks != 1 or not isinstance(source, Node) or not Chunk().fits(source) or not isinstance(index, int):
            return None
        return [(source, -1)] if _count(source) else None  # -1: as many as it splits into

    def emit(self, node: Node, packer: Packer) -> Node:
        source, index = node.args
        assert isinstance(source, Node)
        return packer.call(operator.getitem, (packer.operand(source, node), index), {}, node)


class Chunk(Rule):
    """``chunk`` and ``split`` into equal chunks."""

    targets = overloads("chunk", "split")

    def operands(self, node: Node, chunks: int) -> list[tuple[Node, int]] | None:
        number, source = _count(node), node.args[0]
        assert isinstance(source, Node)
        return [(source, number)] if number else None

    def emit(self, node: Node, packer: Packer) -> Node:
        number, source = _count(node), node.args[0]
        assert isinstance(source, Node)
        return packer.call("chunk", (packer.operand(source, node), number, -1), {}, node)


class Glu(Rule):
    """``F.glu``."""

    targets = overloads("glu")

    def operands(self, node: Node, chunks: int) -> list[tuple[Node, int]] | None:
        source = node.args[0]
        assert isinstance(source, Node)
        fits = chunks == 1 and is_tensor(node) and is_last(argument(node, 1, "dim", -1), source)
        return [(source, 2)] if fits and shape(source)[-1] == 2 * shape(node)[-1] else None

    def emit(self, node: Node, packer: Packer) -> Node:
        source = node.args[0]
        assert isinstance(source, Node)
        return packer.call(node.target, (packer.operand(source, node), -1), {}, node)
