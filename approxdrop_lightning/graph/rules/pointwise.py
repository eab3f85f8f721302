"""Elementwise functions: they apply to packed values as they do to dense ones."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from approxdrop_lightning.graph.rules.rule import (
    Packer,
    Rule,
    argument,
    is_tensor,
    overloads,
    shape,
    tensors,
    value,
)

#: Functions of one tensor with f(0) = 0.
_KEEPS_ZERO = overloads(
    "relu", "relu_", "relu6", "gelu", "tanh", "silu", "leaky_relu", "elu", "selu", "celu", "hardswish", "mish",
    "softsign", "tanhshrink", "softshrink", "hardshrink", "abs", "neg", "square", "sin", "erf", "asinh", "atan",
    "clone", "contiguous", "nan_to_num",
) | {operator.neg}  # fmt: skip
#: Zero stays zero when multiplied or divided by a finite number.
_SCALES = overloads("mul", "div", "multiply", "divide", "mul_", "div_", "true_divide") | {
    operator.mul, operator.truediv, operator.imul, operator.itruediv,
}  # fmt: skip
_OTHERS = overloads(
    "sigmoid", "logsigmoid", "softplus", "hardsigmoid", "hardtanh", "exp", "cos", "add", "sub", "rsub", "add_",
    "sub_", "clamp", "clamp_min", "clamp_max", "pow", "maximum", "minimum", "sqrt", "rsqrt", "log", "threshold",
    "where", "addcmul", "lerp", "reciprocal",
) | {operator.add, operator.sub, operator.iadd, operator.isub, operator.pow}  # fmt: skip


class Pointwise(Rule):
    """Functions of tensors of one shape, values per unit (``[n]``), values per row (``[..., 1]``) and numbers."""

    targets = _KEEPS_ZERO | _SCALES | _OTHERS

    def operands(self, node: Node, chunks: int) -> list[tuple[Node, int]] | None:
        if not is_tensor(node) or argument(node, 99, "out") is not None:
            return None
        found = tensors(node)
        return [(n, chunks) for n in found] if any(shape(n) == shape(node) for n in found) else None

    def keeps_zero(self, node: Node) -> bool:
        if len(tensors(node)) != 1 or not is_tensor(node) or shape(tensors(node)[0]) != shape(node):
            return False
        if node.target in _SCALES:
            # Times inf, or divided by 0, a dropped zero becomes NaN.
            factors = [a for a in node.args if not isinstance(a, Node)]
            divides = node.target not in overloads("mul", "multiply", "mul_") | {operator.mul, operator.imul}
            return (
                len(factors) == 1
                and is_tensor(node.args[0] if divides or isinstance(node.args[0], Node) else node.args[1])
                and isinstance(factors[0], (int, float))
                and math.isfinite(factors[0])
                and not (divides and factors[0] == 0)
            )
        return node.target in _KEEPS_ZERO

    def emit(self, node: Node, packer: Packer) -> Node:
        args = torch.fx.node.map_arg(node.args, lambda n: packer.operand(n, node) if is_tensor(n) else n)
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: packer.operand(n, node) if is_tensor(n) else n)
        # Packed values have a single reader, and what autograd saves must not change: so compute out of place.
        kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
        if node.target in INPLACE_POSITION and len(args) > INPLACE_POSITION[node.target]:
            args = args[: INPLACE_POSITION[node.target]]
        return packer.call(OUT_OF_PLACE.get(node.target, node.target), args, kwargs, node)


#: In-place functions and their out-of-place counterparts.
OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, torch.relu_: torch.relu,
    "relu_": "relu", "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div",
}  # fmt: skip
#: Position of the argument ``inplace``.
INPLACE_POSITION: dict[Any, int] = {
    torch.nn.functional.relu: 1, torch.nn.functional.silu: 1, torch.nn.functional.mish: 1,
    torch.nn.functional.hardswish: 1, torch.nn.functional.relu6: 1,
}  # fmt: skip


class Cast(Rule):
    """Casts to another floating-point type."""

    targets = frozenset({"float", "half", "bfloat16", "double", "to", "type_as", "type"})

    def operands(self, node: Node, chunks: int) -> list[tuple[Node, int]] | None:
        return [(self._source(node), chunks)] if self._is_cast(node) else None

    def keeps_zero(self, node: Node) -> bool:
        return self._is_cast(node)

    def emit(self, node: Node, packer: Packer) -> Node:
        source = self._source(node)
        return packer.call("to", (packer.operand(source, node), value(node).dtype), {}, node)

    @staticmethod
    def _source(node: Node) -> Node:
        assert isinstance(node.args[0], Node)
        return node.args[0]

    def _is_cast(self, node: Node) -> bool:
        source = self._source(node)
        same = is_tensor(node) and is_tensor(source) and value(node).device == value(source).device
        return same and value(node).dtype.is_floating_point and shape(node) == shape(source)


class Prelu(Rule):
    """PReLU, with one slope or with slopes along the second dimension."""

    targets = overloads("prelu") | {torch.prelu}

    def operands(self, node: Node, chunks: int) -> list[tuple[Node, int]] | None:
        return [(self._source(node), chunks)] if self._serves(node) else None

    def keeps_zero(self, node: Node) -> bool:
        return self._serves(node) and value(node.args[1]).numel() == 1

    def emit(self, node: Node, packer: Packer) -> Node:
        source, slopes = self._source(node), node.args[1]
        assert isinstance(slopes, Node)
        values = packer.operand(source, node)
        if value(slopes).numel() == 1:
            return packer.call(node.target, (values, slopes), {}, node)
        from approxdrop_lightning.graph import packed

        return packer.call(packed.prelu, (values, packer.operand(slopes, node)), {}, node)

    @staticmethod
    def _source(node: Node) -> Node:
        assert isinstance(node.args[0], Node)
        return node.args[0]

    def _serves(self, node: Node) -> bool:
        of_units = value(node.args[1]).numel() == 1 or len(shape(node)) == 2
        return is_tensor(node) and of_units and not node.kwargs
