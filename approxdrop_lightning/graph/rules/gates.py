"""Gated units: a layer makes gates and values as runs of its outputs; of each run the same units are kept."""

from __future__ import annotations

import operator

from torch.fx import Node

from approxdrop_lightning.graph.rules.rule import Packer, Rule, argument, is_last, is_tensor, overloads, shape, value


def _halves(node: Node) -> int | None:
    """Into how many equal runs of its last dimension a node cuts its input; None if it does something else."""
    source = node.args[0]
    if not isinstance(source, Node) or not is_tensor(source) or not isinstance(value(node), (tuple, list)):
        return None
    dim = argument(node, 2, "dim", 0)
    widths = {part.shape[-1] for part in value(node)}
    return len(value(node)) if is_last(dim, source) and len(widths) == 1 else None


class Piece(Rule):
    """One of the runs: ``chunk(x, 2, -1)[0]``."""

    targets = frozenset({operator.getitem})

    def operands(self, node: Node, pieces: int) -> list[tuple[Node, int]] | None:
        source, index = node.args
        if pieces != 1 or not isinstance(source, Node) or not Chunk().fits(source) or not isinstance(index, int):
            return None
        return [(source, -1)] if _halves(source) else None  # -1: as many runs as it cuts

    def emit(self, node: Node, packer: Packer) -> Node:
        source, index = node.args
        assert isinstance(source, Node)
        return packer.call(operator.getitem, (packer.operand(source, node), index), {}, node)


class Chunk(Rule):
    """The cut."""

    targets = overloads("chunk", "split")

    def operands(self, node: Node, pieces: int) -> list[tuple[Node, int]] | None:
        number, source = _halves(node), node.args[0]
        assert isinstance(source, Node)
        return [(source, number)] if number else None

    def emit(self, node: Node, packer: Packer) -> Node:
        number, source = _halves(node), node.args[0]
        assert isinstance(source, Node)
        return packer.call("chunk", (packer.operand(source, node), number, -1), {}, node)


class Glu(Rule):
    """``F.glu``."""

    targets = overloads("glu")

    def operands(self, node: Node, pieces: int) -> list[tuple[Node, int]] | None:
        source = node.args[0]
        assert isinstance(source, Node)
        fits = pieces == 1 and is_tensor(node) and is_last(argument(node, 1, "dim", -1), source)
        return [(source, 2)] if fits and shape(source)[-1] == 2 * shape(node)[-1] else None

    def emit(self, node: Node, packer: Packer) -> Node:
        source = node.args[0]
        assert isinstance(source, Node)
        return packer.call(node.target, (packer.operand(source, node), -1), {}, node)
