"""Outputs of linear layers that wait until it is known what reads them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning import functional
from approxdrop_lightning.layers.compact_tensor import CompactTensor
from approxdrop_lightning.layers.contexts import Autocast, saving_as_where, saving_hooks
from approxdrop_lightning.layers.functions import (
    RESHAPES,
    Chain,
    activation_of,
    reshaped_leading,
    run_chain,
    tensors_of,
    with_tensors,
)
from approxdrop_lightning.layers.kept import Kept, unpacked
from approxdrop_lightning.layers.kept_linear import KeptLinear, is_one_node
from approxdrop_lightning.layers.lazy_tensor import LazyTensor, is_pointwise, shape_of
from approxdrop_lightning.layers.made_by import note_layer
from approxdrop_lightning.layers.use import Use
from approxdrop_lightning.layers.waiting import settle
from approxdrop_lightning.ops.derivative import vjp
from approxdrop_lightning.ops.row_linear.one_pass import linear_between
from approxdrop_lightning.patterns.row import RowPattern

if TYPE_CHECKING:
    from approxdrop_lightning.layers.linear import ApproxLinear
    from approxdrop_lightning.layers.site import Site


class _Product:
    """What the nodes of pending outputs compute the masked derivative from; it holds no tensor.

    Args:
        autocast: Of the call.
        shape: Of the output.
        packed: How the layer's input is packed, as :attr:`.Kept.packing` says; None if it is dense.
    """

    __slots__ = ("autocast", "before", "own", "packed", "shape")

    def __init__(self, autocast: Autocast, shape: tuple[int, ...], packed: tuple[Any, ...] | None) -> None:
        self.autocast, self.shape, self.packed = autocast, shape, packed
        #: Functions of the outputs that this one was derived from, and those put down since.
        self.before: Chain = ()
        self.own: Chain = ()

    def followed_by(self, shape: tuple[int, ...], function: Any = None) -> _Product:
        """For the output that a function, or a reshaping, makes of this one."""
        other = _Product(self.autocast, shape, self.packed)
        other.before, other.own = self.before + self.own, () if function is None else (function,)
        return other

    def input(self, x: Tensor) -> Tensor:
        """The dense input of the layer."""
        return x if self.packed is None else unpacked(x, self.packed)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The dense output, as far as the outputs go that this one was derived from."""
        with self.autocast.context():
            return run_chain(self.before, F.linear(x, weight, bias))

    def finish(self, y: Tensor, *tensors: Tensor) -> Tensor:
        """What this output makes of it, and of the tensors that its functions have."""
        with self.autocast.context():
            return run_chain(with_tensors(self.own, tensors), y.view(self.shape))


def _operands(node: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias that the node of a product has saved, for all nodes that read them in a backward pass.

    Activation checkpointing unpacks what was saved only once in a pass.
    """
    number = torch._C._current_graph_task_id()
    if node.unpacked is None or node.unpacked[0] != number:
        node.unpacked = number, node.saved_tensors
    found: tuple[Tensor, Tensor, Tensor | None] = node.unpacked[1]
    return found


def dense_again(node: Any, formula: _Product) -> Tensor:
    """The dense output of a pending one, within a backward pass; see :attr:`Pending.recipe`."""
    x, weight, bias = _operands(node)
    return formula.finish(formula.product(formula.input(x), weight, bias))


class _Node(torch.autograd.Function):
    """A pending output in the graph: of input, weight and bias, or of the pending output it was derived from."""

    @staticmethod
    def forward(ctx: Any, cls: type, held: Pending, *above: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.formula = held.formula
        ctx.root = held.node
        if ctx.root is None:
            held.node, ctx.unpacked = ctx, None
            if held.layer.watched:
                note_layer(ctx, held.layer)
            ctx.save_for_backward(held.read_input(), *above[1:])
        else:
            ctx.save_for_backward(*above[1:])
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # as in most steps: nobody has gone this way
            return (None,) * len(ctx.needs_input_grad)
        settle()
        wanted = ctx.needs_input_grad[2:]
        formula: _Product = ctx.formula
        x, weight, bias = _operands(ctx.root or ctx)
        x = formula.input(x)
        if ctx.root is None:
            ctx.unpacked = None  # the last one to read them
            return None, None, *vjp(lambda *a: formula.finish(formula.product(*a)), (x, weight, bias), wanted, grad)
        inputs = formula.product(x, weight, bias), *ctx.saved_tensors
        return None, None, *vjp(formula.finish, inputs, wanted, grad)


class Pending:
    """What a :class:`PendingLinear` holds.

    Args:
        layer: The layer.
        x: Its input, dense or compact.
        shape: Shape of its output.
        weight: Weight of the call; ``torch.func.functional_call``, for one, replaces the layer's for its duration.
        bias: Bias of the call.
    """

    def __init__(
        self, layer: ApproxLinear, x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None
    ) -> None:
        self.layer, self.x, self.shape = layer, x, shape
        #: Elementwise functions put down so far, as ``(function, arguments, keywords)``.
        self.chain: Chain = ()
        #: Uses of sites that had kept units of this very output computed; common to all that is derived from it.
        self.readers: list[Use] = []
        self.name, self.backend, self._work = layer.name, layer.backend, layer.work
        self.weight, self.bias = weight, bias
        compact = x.held if isinstance(x, CompactTensor) else None
        self.device = x.device if compact is None else compact.device
        self.autocast = Autocast(self.device.type)
        dtype = x.dtype if compact is None else compact.dtype
        self.dtype = self.autocast.dtype if self.autocast.enabled else dtype
        #: The node of the product, and what it and those of derived outputs compute.
        self.node: Any = None
        self.formula = _Product(self.autocast, shape, None if compact is None else compact.packing)
        self._hooks = saving_hooks()
        self._versions = self._input_versions()

    def _input_versions(self) -> tuple[int, ...]:
        bias = 0 if self.bias is None else self.bias._version
        chain = (t._version for t in tensors_of(self.chain)) if self.chain else ()
        return self.read_input()._version, self.weight._version, bias, *chain

    def read_input(self) -> Tensor:
        """What the product reads: the dense input, or its kept values."""
        return self.x.held.values if isinstance(self.x, CompactTensor) else self.x

    may_change = True

    @property
    def recipe(self) -> tuple[Any, _Product]:
        """What the output can be computed from again, without the output itself."""
        return self.node, self.formula

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers whose outputs it is made of."""
        return (self.name,)

    @property
    def has_changed(self) -> bool:
        return self._versions != self._input_versions()

    def derived(self, **changed: Any) -> Pending:
        """The same product, in another shape or with another chain."""
        other = object.__new__(Pending)
        vars(other).update(vars(self), **changed)
        return other

    def followed_by(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pending | None:
        """With one more function at the end of the chain; None if it is called in another autocast than the layer."""
        if not self.autocast.is_current:
            return None
        dtype = self.dtype
        if self.autocast.enabled:  # which takes some functions to float32
            dtype = func(torch.empty(0, dtype=dtype, device=self.device), *args, **kwargs).dtype
        function = (func, args, kwargs)
        return self.derived(
            chain=(*self.chain, function),
            dtype=dtype,
            formula=self.formula.followed_by(self.shape, function),
            _versions=(*self._versions, *(t._version for t in tensors_of((function,)))),
        )

    def reshaped(self, shape: tuple[int, ...]) -> Pending:
        """In another shape."""
        return self.derived(shape=shape, formula=self.formula.followed_by(shape))

    def compute(self) -> Tensor:
        with self._context():
            return run_chain(self.chain, self._dense_product())

    def compute_from(self, dense: Tensor, chain: Chain) -> Tensor:
        """The dense tensor, from that of an output that this one was derived from, whose chain is given."""
        with self._context():
            return run_chain(self.chain[len(chain) :], dense if dense.shape == self.shape else dense.view(self.shape))

    def _dense_product(self) -> Tensor:
        self._note(after=None)
        if isinstance(self.x, CompactTensor):
            y = self.x.linear(self.weight, self.bias, reader=self.name)
        else:
            y = F.linear(self.x, self.weight, self.bias)
        if y.grad_fn is not None and self.layer.watched:
            note_layer(y.grad_fn, self.layer)
        return y if y.shape == self.shape else y.view(self.shape)

    @property
    def multiplies(self) -> int:
        """Of the dense product."""
        return math.prod(shape_of(self.x)) * self.weight.shape[0]

    def _note(self, after: Site | None) -> None:
        """Note the product: between the site that made ``x``, if any, and the site ``after`` it, if any."""
        if self._work.is_closed:
            return
        if isinstance(self.x, CompactTensor) and self.x.is_lazy:
            for before, multiplies in self.x.held.use.shares(self.multiplies):
                self._work.note(before, after, multiplies)
        else:
            self._work.note(None, after, self.multiplies)

    def _context(self) -> contextlib.AbstractContextManager[Any]:
        """As it was when the layer was called."""
        if self.has_changed:
            raise RuntimeError(
                f"{self.name}: its output is read for the first time after its input or parameters were "
                "changed in place; read it before that"
            )
        if self.autocast.is_current:
            return saving_as_where(self._hooks)
        context = contextlib.ExitStack()
        context.enter_context(saving_as_where(self._hooks))
        context.enter_context(self.autocast.context())
        return context

    def dropped(self, pattern: RowPattern, use: Use, scale: float, source: LazyTensor) -> CompactTensor:
        """The dropped-out tensor of a site's pattern: the units that it drops are not computed.

        Args:
            pattern: The pattern.
            use: Of the site.
            scale: Factor of kept values.
            source: The pending output itself.
        """
        compact = self.x.held if isinstance(self.x, CompactTensor) else None
        activation = activation_of(self.chain)
        x, rows = self.read_input(), self.shape[:-1]
        fits = self._one_grouping(compact, pattern) if compact is not None else self.x.shape[:-1] == rows
        if activation is None or not fits or not is_one_node(x, self.weight, self.bias, self.backend):
            values = self.kept_values(pattern, use)
            return CompactTensor.kept_of(source, values, (pattern, rows, self.shape), use, scale)
        source.place.use()
        with self._begin(compact, use):
            layer = linear_between(None if compact is None else compact.pattern, pattern, rows, self.weight)
            node, values = KeptLinear.apply(
                CompactTensor,
                layer,
                activation,
                scale,
                (pattern, rows, self.shape),
                source,
                x,
                self.weight,
                self.bias,
            )
        values = values if pattern.interleave else values.view(*rows, pattern.n_kept)
        return CompactTensor(Kept(self.shape, pattern, rows, use, values), node=node)

    def _begin(self, compact: Kept | None, use: Use) -> contextlib.AbstractContextManager[Any]:
        """Note that a site reads kept units of a product that serves the patterns of both sides."""
        context = self._context()
        self.readers.append(use)
        self._note(use.site)
        if compact is not None:
            compact.use.read_kept(self.name, self.multiplies)
        return context

    def kept_values(self, pattern: RowPattern, use: Use) -> Tensor:
        """Values of the units that a site's pattern keeps, packed; the others are not computed."""
        rows = self.shape[:-1]
        compact = self.x.held if isinstance(self.x, CompactTensor) else None
        if compact is not None and not self._one_grouping(compact, pattern):
            # Rows fall into other groups than those of the input: take that side's saving, then select.
            self.readers.append(use)
            with self._context():
                return run_chain(self.chain, functional.pack(self._dense_product(), pattern, self.backend))
        with self._begin(compact, use):
            if compact is None:
                x = self.x if self.x.shape[:-1] == rows else self.x.reshape(*rows, self.x.shape[-1])
                values = functional.row_linear(x, self.weight, self.bias, None, pattern, backend=self.backend)
            else:
                values = functional.row_linear(
                    compact.values, self.weight, self.bias, compact.pattern, pattern, backend=self.backend,
                    leading_shape=rows,
                )  # fmt: skip
            return run_chain(self.chain, values)

    def _one_grouping(self, compact: Kept, pattern: RowPattern) -> bool:
        """Whether one product can serve the patterns of input and output."""
        if compact.pattern.interleave and compact.rows != self.shape[:-1]:
            return False
        return functional.lines_up(compact.pattern, pattern)


class PendingLinear(LazyTensor):
    """Output of an :class:`ApproxLinear` that nobody has read yet."""

    held: Pending

    @staticmethod
    def __new__(
        cls,
        held: Pending,
        view_of: LazyTensor | None = None,
        made_of: LazyTensor | None = None,
        node: PendingLinear | None = None,
    ) -> PendingLinear:
        if node is not None:
            return node
        above = view_of if made_of is None else made_of
        if above is None:
            return _Node.apply(cls, held, held.x, held.weight, held.bias)
        return _Node.apply(cls, held, above, *tensors_of(held.formula.own))

    def __init__(
        self, held: Pending, view_of: LazyTensor | None = None, made_of: LazyTensor | None = None, **how: Any
    ) -> None:
        super().__init__(held, view_of, made_of)
        if isinstance(held.x, CompactTensor) and self.place.above is None:
            self.place.above = held.x.place
            held.x.place.use()

    def _dense_from_above(self) -> Tensor:
        held, place = self.held, self.place.above
        while place is not None:
            tensor = place.tensor
            if isinstance(tensor, PendingLinear) and tensor.held.node is held.node and not tensor._storage.changed:
                return held.compute_from(tensor.dense(), tensor.held.chain)
            place = place.above
        return held.compute()

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        held = self.held
        if is_pointwise(func, args, kwargs):
            in_place = kwargs.get("inplace", False)
            if in_place and (self._storage.shared or self.place.extended or self.place.used):
                return NotImplemented
            longer = held.followed_by(func, args, {**kwargs, "inplace": False} if in_place else kwargs)
            if longer is None or (in_place and longer.dtype != held.dtype):
                return NotImplemented
            if in_place:
                held.chain = longer.chain
                held.formula.own += longer.formula.own
                return self
            self.place.extended = True
            return PendingLinear(longer, made_of=self)
        if func in RESHAPES:
            shape = reshaped_leading(func, held.shape, args, kwargs)
            if shape is not None:
                self.place.extended = True
                return PendingLinear(held.reshaped(shape), view_of=self)
        return NotImplemented

    def _read_by(self, name: str) -> None:
        self.held.layer.read_whole_by = name
        if self.is_lazy and self.held.readers and torch.is_grad_enabled():  # not for a metric that looks now and then
            self.held.layer.read_whole_too = True
