"""Stacked tensors (``torch.stack``): what is made of the stack is made of its parts.

``linear(f(stack(a, b)))`` becomes ``stack(linear(f(a)), linear(f(b)))`` for elementwise ``f`` that keep zeros, if the
parts come from dropouts by which skipping then gains; ``drop(f(stack(a, b)))`` becomes
``stack(drop(f(a)), drop(f(b)))``, each part with a pattern of its own; ``flatten(f(stack(a, b)))`` becomes
``f(cat(a, b))``, and ``drop(sum(f(stack(a, b))))`` becomes ``drop(f(a) + f(b))``. The rest of the pass then needs no
rule for stacks.
"""

from __future__ import annotations

import operator
from functools import partial, reduce

import torch
from torch import Tensor
from torch.fx import Node

from approxdrop_lightning.graph.chains import Chains, keeps_zero, parts_of
from approxdrop_lightning.graph.decide import gains
from approxdrop_lightning.graph.find import Drop, Dropouts
from approxdrop_lightning.graph.nodes import bias, is_linear, multiplies, weight
from approxdrop_lightning.graph.rules.rule import argument, is_tensor, overloads, shape

_STACK, _SUM, _MEAN = overloads("stack"), overloads("sum"), overloads("mean")
_RESHAPES = overloads("view", "reshape", "flatten")


def take_stacks_apart(dropouts: Dropouts) -> None:
    """Replace what is made of stacks by the same of their parts, wherever the rest of the pass can gain by it."""
    stacks = _Stacks(dropouts)
    for node in list(dropouts.graph.nodes):
        if node in dropouts.drops:
            stacks.split_dropout(dropouts.drops[node])
        elif is_linear(node):
            stacks.split_layer(node)
        elif node.op in ("call_function", "call_method") and node.target in _RESHAPES:
            stacks.concatenate(node)
    dropouts.drops = {node: dropouts.drops[node] for node in dropouts.graph.nodes if node in dropouts.drops}
    for drop in dropouts.drops.values():
        stacks.add_up(drop)


class _Stacks:
    def __init__(self, dropouts: Dropouts) -> None:
        self.dropouts, self.graph = dropouts, dropouts.graph
        self.chains = Chains(dropouts.graph, dropouts.mutated)

    def split_layer(self, layer: Node) -> None:
        """A layer of a stack: a stack of layers, if each of them reads a dropout by which it gains."""
        chain, stack = self.chains.back(layer.args[0], _STACK, _is_of_rows, alone=False)
        if stack is None or not all(map(keeps_zero, chain)) or layer in self.chains.mutated:
            return
        parts, dim = parts_of(stack), _dim(stack)
        sources = [self.dropouts.source(part) for part in parts]
        if not all(drop is not None and gains(drop, multiplies(layer) // len(parts)) for drop in sources):
            return
        made = []
        with self.graph.inserting_before(layer):
            for i, part in enumerate(parts):
                of = partial(torch.select, dim=dim, index=i)
                x = self.chains.through(chain, part, of)
                made.append(self.chains.like(layer, (x, weight(layer), bias(layer)), of))
                made[-1].kwargs = {}
            whole = self.chains.like(layer, (made, dim), target=torch.stack)
        layer.replace_all_uses_with(whole)
        self.chains.erase_unread([layer, *chain, stack])

    def split_dropout(self, drop: Drop) -> None:
        """A dropout of stacked outputs of layers: a stack of dropouts."""
        chain, stack = self.chains.back(drop.x, _STACK, _is_of_rows)
        if stack is None or len(shape(stack)) < 3:
            return
        layers = self._layers_before(stack)
        if not layers or not gains(drop, sum(map(multiplies, layers))):
            return
        dim = _dim(stack)
        parts = [(part, partial(torch.select, dim=dim, index=i)) for i, part in enumerate(parts_of(stack))]
        found = self.chains.split(drop.node, chain, parts)
        with self.graph.inserting_before(drop.node):
            whole = self.chains.like(drop.node, (found, dim), target=torch.stack)
        drop.node.replace_all_uses_with(whole)
        del self.dropouts.drops[drop.node]
        self.dropouts.drops.update((node, Drop(node, drop.book, drop.site, drop.pair)) for node in found)
        self.chains.erase_unread([drop.node, *chain, stack])

    def _layers_before(self, stack: Node) -> list[Node]:
        """Linear layers that compute parts of a stack."""
        return [node for node in map(self.chains.root, parts_of(stack)) if is_linear(node)]

    def concatenate(self, flat: Node) -> None:
        """A stack that is reshaped to have its parts side by side: a concatenation."""
        chain, stack = self.chains.back(flat.args[0] if flat.args else None, _STACK, _is_of_rows, alone=False)
        if stack is None or not is_tensor(flat) or flat in self.chains.mutated:
            return
        *leading, k, n = shape(stack)
        if _dim(stack) != len(leading) or list(map(str, shape(flat))) != list(map(str, (*leading, k * n))):
            return
        with self.graph.inserting_before(flat):
            cat = self.chains.like(stack, (parts_of(stack), -1), _side_by_side, torch.cat)
            flat.replace_all_uses_with(self.chains.through(chain, cat, _side_by_side))
        self.chains.erase_unread([flat, *chain, stack])

    def add_up(self, drop: Drop) -> None:
        """A dropout of the sum or mean of stacked outputs of layers: of these, added up."""
        _, total = self.chains.back(drop.x, _SUM | _MEAN, is_tensor)
        if total is None or not total.args:
            return
        chain, stack = self.chains.back(total.args[0], _STACK, _is_of_rows)
        if stack is None or not _is_over(total, stack):
            return
        layers = self._layers_before(stack)
        if not layers or not gains(drop, sum(map(multiplies, layers))):
            return
        with self.graph.inserting_before(total):
            terms = [
                self.chains.through(chain, part, partial(torch.select, dim=_dim(stack), index=i))
                for i, part in enumerate(parts_of(stack))
            ]
            new = reduce(lambda x, y: self.chains.like(total, (x, y), target=operator.add), terms)
            if total.target in _MEAN:
                new = self.chains.like(total, (new, len(terms)), target=operator.truediv)
        total.replace_all_uses_with(new)
        self.chains.erase_unread([total, *chain, stack])


def _side_by_side(x: Tensor) -> Tensor:
    return x.flatten(-2)


def _dim(stack: Node) -> int:
    dim: int = argument(stack, 1, "dim", 0)
    return dim % len(shape(stack))


def _is_of_rows(stack: Node) -> bool:
    """Whether tensors are stacked in any dimension but the last."""
    return bool(parts_of(stack)) and _dim(stack) != len(shape(stack)) - 1 and isinstance(shape(stack)[-1], int)


def _is_over(total: Node, stack: Node) -> bool:
    """Whether a sum or mean is that of the parts of a stack."""
    dim = argument(total, 1, "dim")
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
    if len(total.args) > 2 or not set(total.kwargs) <= {"dim"} or not isinstance(dim, int):
        return False
    return dim % len(shape(stack)) == _dim(stack)
