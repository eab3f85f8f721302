"""Stacks (``torch.stack``) of dropped-out tensors or of pending outputs, which stay lazy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning.layers.combined import stand_below
from approxdrop_lightning.layers.compact_tensor import CompactTensor, acts_on_kept
from approxdrop_lightning.layers.functions import RESHAPES, reshaped
from approxdrop_lightning.layers.lazy_tensor import COMBINATIONS, LazyTensor, is_pointwise, shape_of
from approxdrop_lightning.layers.pending import PendingLinear
from approxdrop_lightning.layers.waiting import settle

_SUMS = (torch.sum, Tensor.sum)
_MEANS = (torch.mean, Tensor.mean)


class Stack:
    """What a :class:`StackedTensor` holds.

    Args:
        parts: Tensors of one shape, either all dropped out or all pending.
        dim: Dimension in which they are stacked; not the last one of the result.
    """

    #: Its parts are computed before a change.
    may_change = has_changed = False

    def __init__(self, parts: tuple[CompactTensor, ...] | tuple[PendingLinear, ...], dim: int) -> None:
        self.parts, self.dim = parts, dim
        shape = shape_of(parts[0])
        self.shape = (*shape[:dim], len(parts), *shape[dim:])
        self.dtype, self.device = parts[0].held.dtype, parts[0].held.device

    def compute(self) -> Tensor:
        # What is not computed yet is not shared: below autograd it has no history.
        return torch.stack([p.held.compute() if p.is_lazy else p.as_made() for p in self.parts], self.dim)


class _Stack(torch.autograd.Function):
    """Stacked tensors in the graph: of these."""

    @staticmethod
    def forward(ctx: Any, cls: type, held: Stack, *parts: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.dim, ctx.n_parts = held.dim, len(parts)
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        settle()
        return None, None, *([None] * ctx.n_parts if grad is None else grad.unbind(ctx.dim))


class _Unstack(torch.autograd.Function):
    """The parts again, as functions of the stacked tensor: what is made of them has its gradient."""

    @staticmethod
    def forward(ctx: Any, held: Stack, stacked: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dim = held.dim
        return tuple(
            torch.Tensor._make_wrapper_subclass(type(part), part.held.shape, dtype=held.dtype, device=held.device)
            for part in held.parts
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        settle()
        given = next((grad for grad in grads if grad is not None), None)
        if given is None:
            return None, None
        return None, torch.stack([torch.zeros_like(given) if grad is None else grad for grad in grads], ctx.dim)


class StackedTensor(LazyTensor):
    """Stacked tensors: a function that treats all parts alike is applied to each of them."""

    held: Stack

    @staticmethod
    def __new__(cls, held: Stack) -> StackedTensor:
        return _Stack.apply(cls, held, *held.parts)

    def __init__(self, held: Stack) -> None:
        super().__init__(held)
        stand_below(self, held.parts)

    def _dense_from_above(self) -> Tensor:
        return torch.stack([part.as_made() for part in self.held.parts], self.held.dim)

    @property
    def _acts(self) -> bool:
        # What has been computed, because it might change or was read elsewhere, is read as it is.
        parts = self.held.parts
        return super()._acts and all(p.is_lazy or (isinstance(p, CompactTensor) and p.held.has_values) for p in parts)

    def _read_by(self, name: str) -> None:
        for part in self.held.parts:
            part._read_by(name)

    @property
    def waits(self) -> bool:
        """Whether its parts are outputs, of rows, that layers have not computed yet."""
        return self._acts and isinstance(self.held.parts[0], PendingLinear) and len(self.held.shape) > 2

    @property
    def kind_of_parts(self) -> tuple[tuple[int, ...], torch.device, torch.dtype]:
        """Shape, device and type of each part."""
        return shape_of(self.held.parts[0]), self.held.device, self.held.dtype

    def serves(self, multiplies: int) -> bool:
        """Whether a product of so many multiplies had better be one for each part, of kept values."""
        share, parts = multiplies // len(self.held.parts), self.held.parts
        uses = [part.held.use for part in parts if isinstance(part, CompactTensor) and not part.held.has_values]
        # All are asked, so that each site knows why it is read whole.
        small = [use.saves_too_few(share) for use in uses]
        return self._acts and isinstance(parts[0], CompactTensor) and not any(small)

    def unstacked(self) -> list[Any]:
        """The parts, as functions of this tensor."""
        self.place.use()
        nodes: Any = _Unstack.apply(self.held, self)
        parts = [
            type(part)(part.held, made_of=self, node=node) for part, node in zip(self.held.parts, nodes, strict=True)
        ]
        for part in parts:
            part.place.used = part.place.by_node = True
        return parts

    def of_each(self, function: Callable[[Any], Any]) -> Any:
        """Apply a function to each part, and stack the results."""
        return torch.stack([function(part) for part in self.unstacked()], self.held.dim)

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        held = self.held
        dropped = isinstance(held.parts[0], CompactTensor)
        if func is F.linear:
            weight = args[0] if args else kwargs["weight"]
            if weight.dim() == 2 and self.serves(math.prod(held.shape) * len(weight)):
                return self.of_each(lambda part: func(part, *args, **kwargs))
        elif not kwargs.get("inplace") and (acts_on_kept if dropped else is_pointwise)(func, args, kwargs):
            return self.of_each(lambda part: func(part, *args, **kwargs))
        elif func in RESHAPES:
            shape, side_by_side = reshaped(func, held.shape, args, kwargs), held.shape[-2] * held.shape[-1]
            if shape is not None and held.dim == len(held.shape) - 2 and shape[-1:] == (side_by_side,):
                whole = torch.cat(self.unstacked(), -1)
                return whole if whole.shape == shape else whole.view(shape)
        elif func in (*_SUMS, *_MEANS) and not dropped and self._is_over_parts(args, kwargs):
            total = reduce(torch.add, self.unstacked())
            return total / len(held.parts) if func in _MEANS else total
        return NotImplemented

    def _is_over_parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the only argument of a sum or mean is the stacked dimension."""
        given = (*args, *kwargs.values())
        if len(given) != 1 or not set(kwargs) <= {"dim", "axis"}:
            return False
        dim = given[0][0] if isinstance(given[0], (tuple, list)) and len(given[0]) == 1 else given[0]
        return isinstance(dim, int) and dim in (self.held.dim, self.held.dim - len(self.held.shape))


def _stack(tensors: Any, dim: Any = 0, *args: Any, **kwargs: Any) -> Any:
    """``torch.stack`` of tensors that are all dropped out or all pending, in any dimension but the last."""
    parts = tuple(tensors) if isinstance(tensors, (tuple, list)) else ()
    kind = type(parts[0]) if parts else None
    if args or kwargs or len(parts) < 2 or kind not in (CompactTensor, PendingLinear) or not isinstance(dim, int):
        return NotImplemented
    if not all(type(part) is kind and part._acts for part in parts):
        return NotImplemented
    first, last = parts[0].held, len(parts[0].held.shape)
    if not -last - 1 <= dim < last or dim == -1 or 0 in first.shape:
        return NotImplemented
    if len({(part.held.shape, part.held.dtype, part.held.device) for part in parts}) > 1:
        return NotImplemented
    if kind is CompactTensor:
        uses = [use for part in parts for use in part.held.use.parts]
        for use in uses:
            use.put_beside(uses)
    return StackedTensor(Stack(parts, dim % (last + 1)))


COMBINATIONS[torch.stack] = _stack
