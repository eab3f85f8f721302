"""Output of a dropout site: holds only the kept values, or computes them on demand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning import functional
from approxdrop_lightning.layers.contexts import Autocast
from approxdrop_lightning.layers.functions import KEEPS_ZERO, RESHAPES, has_tensor, reshaped_leading
from approxdrop_lightning.layers.kept import Kept, Packing, Seen, masked, unpacked
from approxdrop_lightning.layers.kept_linear import Keep, KeptInputs, is_one_node
from approxdrop_lightning.layers.lazy_tensor import LazyTensor, shape_of
from approxdrop_lightning.layers.waiting import note_backward, settle
from approxdrop_lightning.ops.derivative import must_be_differentiable, vjp
from approxdrop_lightning.ops.row_linear.one_pass import linear_between

_DIVISIONS = {torch.div, Tensor.div, Tensor.__truediv__}
_SCALES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__} | _DIVISIONS


def acts_on_kept(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``func(x, *args, **kwargs)`` keeps the zeros of ``x``, so that it may act on kept values alone."""
    if func in _SCALES and len(args) == 1 and isinstance(args[0], (int, float)) and not kwargs:
        # inf and 0 divisors make NaN of a dropped zero: let the dense tensor show it.
        return math.isfinite(args[0]) and (args[0] != 0 or func not in _DIVISIONS)
    return func in KEEPS_ZERO and not has_tensor((*args, *kwargs.values())) and not kwargs.get("inplace")


class _Mask(torch.autograd.Function):
    """A dropped-out tensor in the graph: of the dense tensor that it was dropped from."""

    @staticmethod
    def forward(ctx: Any, cls: type, held: Kept, given: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mask = held.pattern, held.rows, held.scale
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        settle()
        return None, None, None if grad is None else masked(grad, *ctx.mask)


class _Derive(torch.autograd.Function):
    """A dropped-out tensor in the graph: a function of another one, or its values in another shape."""

    @staticmethod
    def forward(ctx: Any, cls: type, held: Kept, function: Any, source: CompactTensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.function, ctx.packing = function, source.held.packing
        if function is not None:
            ctx.save_for_backward(source.held.values)
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        settle()
        if grad is None:
            return None, None, None, None
        if ctx.function is None:
            return None, None, None, grad.reshape(ctx.packing[-1])
        func, args, kwargs = ctx.function
        (values,) = ctx.saved_tensors
        dense = unpacked(values, ctx.packing)
        return None, None, None, *vjp(lambda x: func(x, *args, **kwargs), (dense,), (True,), grad)


class _Past(torch.autograd.Function):
    """What a layer has made in a way that autograd cannot follow everywhere; see :func:`past`."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: Callable[..., Any],
        n_results: int,
        source: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.n_results = layer, n_results
        ctx.packing, ctx.place, read = None, None, source
        if isinstance(source, CompactTensor):
            ctx.packing, ctx.place, read = source.held.packing, source.place, source.held.values
        ctx.autocast = Autocast(read.device.type)
        ctx.save_for_backward(read, *tensors[n_results:])
        # New names of the results: autograd takes those of inputs for views, which nobody may change in place.
        return tuple(result.detach() for result in tensors[:n_results])  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:3] + ctx.needs_input_grad[3 + ctx.n_results :]
        given = next((grad for grad in grads if grad is not None), None)
        wanted_too = ctx.place is not None and ctx.place.is_wanted
        if given is None or not (wanted_too or must_be_differentiable(given)):
            return None, None, None, *grads, *[None] * (len(wanted) - 1)
        read, *others = ctx.saved_tensors
        if ctx.packing is not None:
            read = unpacked(read, ctx.packing)
        with ctx.autocast.context():
            source, *found = vjp(ctx.layer, (read, *others), wanted, grads)
        return None, None, source, *[None] * ctx.n_results, *found


def past(
    layer: Callable[..., Any],
    source: Tensor,
    results: Sequence[Tensor],
    others: Sequence[Tensor | None],
) -> Sequence[Tensor]:
    """What a layer has made of a tensor's kept values, past the tensor that holds them, as a part of the graph.

    Where somebody wants that tensor's gradient, or derivatives of the gradients, they are computed by what the layer
    would have made of the dense one.

    Args:
        layer: Makes the results of the dense tensor and the others, in functions of PyTorch.
        source: The tensor; an ordinary one if the layer has read it as it is.
        results: What the layer has made.
        others: The other tensors that it has read.

    Returns:
        The results.
    """
    if isinstance(source, CompactTensor):
        source.place.use()
    if not any(result.requires_grad for result in results):
        return results
    return _Past.apply(layer, len(results), source, *results, *others)


class Combine(torch.autograd.Function):
    """Tensors side by side, or their sum, in the graph: of these."""

    @staticmethod
    def forward(ctx: Any, cls: type, held: Any, adds: bool, *parts: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.widths = None if adds else [shape_of(part)[-1] for part in parts]
        ctx.n_parts = len(parts)
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        settle()
        if grad is None:
            return None, None, None, *[None] * ctx.n_parts
        return None, None, None, *([grad] * ctx.n_parts if ctx.widths is None else grad.split(ctx.widths, dim=-1))


class CompactTensor(LazyTensor):
    """Output of dropout. Consumers read the kept values; all other functions see zeros filled in.

    Args:
        held: What it holds.
        view_of: As of :class:`.LazyTensor`.
        made_of: Likewise.
        function: What it was derived by, as ``(function, arguments, keywords)``.
        parts: The dropped-out tensors that it shows side by side.
        node: The tensor itself, if a node of the graph has made it along with its values.
    """

    held: Kept

    @staticmethod
    def __new__(
        cls,
        held: Kept,
        view_of: CompactTensor | None = None,
        made_of: CompactTensor | None = None,
        function: Any = None,
        parts: tuple[CompactTensor, ...] = (),
        node: CompactTensor | None = None,
    ) -> CompactTensor:
        if node is not None:
            return node
        if parts:
            return Combine.apply(cls, held, False, *parts)
        above = view_of if made_of is None else made_of
        if above is not None:
            return _Derive.apply(cls, held, function, above)
        return _Mask.apply(cls, held, held.given)

    @classmethod
    def kept_of(cls, source: LazyTensor, values: Tensor, packing: Packing, use: Seen, scale: float) -> CompactTensor:
        """The dropped-out tensor of a pending output.

        Args:
            source: The pending output.
            values: Its kept values, yet to be scaled.
            packing: How they are packed.
            use: What is told who reads.
            scale: Factor of kept values.
        """
        source.place.use()
        node, values = Keep.apply(cls, packing, scale, values, source)
        pattern, rows, shape = packing
        return cls(Kept(shape, pattern, rows, use, values), node=node)

    def _dense_from_above(self) -> Tensor:
        place = self.place.above
        while place is not None:
            if place.tensor is not None or place.beside:
                return self._as_function_of_itself()
            place = place.above
        dense = self.held.compute()
        if self.held.use.steps < 2 and dense.requires_grad:  # has resample been forgotten? Later it has not.
            dense.register_hook(note_backward)
        return dense

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.linear:
            weight = args[0] if args else kwargs["weight"]
            if weight.dim() != 2 or not self.serves(math.prod(self.held.shape) * len(weight)):
                return NotImplemented
            return self.linear(*args, **kwargs)
        if acts_on_kept(func, args, kwargs):
            return self._with(func, args, kwargs)
        if func in RESHAPES:
            shape = reshaped_leading(func, self.held.shape, args, kwargs)
            if shape is not None:
                self.place.use()
                return CompactTensor(self.held.with_values(self.held.values, shape), view_of=self)
        return NotImplemented

    def serves(self, multiplies: int) -> bool:
        """Whether a product of so many multiplies had better read kept values, as it does if they are packed."""
        held = self.held
        if not self.is_lazy or held.has_values:
            return self.is_lazy
        return not held.use.saves_too_few(multiplies)

    def _read_by(self, name: str) -> None:
        self.held.use.read_whole(name)

    def _with(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompactTensor:
        self.place.use()
        held = self.held.with_values(func(self.held.values, *args, **kwargs), self.held.shape)
        return CompactTensor(held, made_of=self, function=(func, args, kwargs))

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        reader: str = "F.linear",
    ) -> Tensor:
        """``F.linear(self, weight, bias)``, reading only the columns of the weight that are kept."""
        held = self.held
        held.use.read_kept(reader, math.prod(held.shape) * len(weight))
        values, backend = held.values, held.use.backend
        self.place.use()
        if is_one_node(values, weight, bias, backend) and weight.shape[1] == held.pattern.n:
            layer = linear_between(held.pattern, None, held.rows, weight)
            y = KeptInputs.apply(layer, held.packing, self, values, weight, bias)
            return y if y.shape[:-1] == held.shape[:-1] else y.view(*held.shape[:-1], len(weight))
        y = functional.row_linear(values, weight, bias, held.pattern, backend=backend, leading_shape=held.rows)
        if held.rows != held.shape[:-1]:
            y = y.view(*held.shape[:-1], len(weight))
        return past(F.linear, self, [y], [weight, bias])[0]
