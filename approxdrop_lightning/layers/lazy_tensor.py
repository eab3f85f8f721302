"""A tensor that is dense to all functions but those that know a cheaper way.

Model code between a producer, a dropout and its consumers is arbitrary Python. So that it may stay as it is,
the layers hand each other subclasses of ``torch.Tensor`` with the full shape and dtype. A function that a
subclass knows is computed on what it holds; to every other function it is the dense tensor, autograd included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from approxdrop_lightning.layers.contexts import run_eagerly
from approxdrop_lightning.layers.functions import BACKWARD, METADATA, OF_THE_GRAPH, POINTWISE, PRELU, has_tensor
from approxdrop_lightning.layers.waiting import wait


class Held(Protocol):
    """What a lazy tensor holds instead of its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    #: Whether a change elsewhere would change the values that are yet to be computed.
    may_change: bool

    @property
    def has_changed(self) -> bool:
        """Whether there was one."""

    def compute(self) -> Tensor:
        """The dense tensor, as a differentiable function of what it is computed from."""


class Place:
    """The place of a lazy tensor in the graph of autograd.

    Sites and layers that know a lazy tensor read what it holds, so a gradient passes it by. Yet it is a node of the
    graph, beside that way. If somebody wants its gradient (a hook, ``retain_grad``, ``torch.autograd.grad``), be it
    after the forward pass, the backward pass takes the way through the node: there the masked, dense derivative is
    computed, as in the stock model.

    Args:
        above: Place of the lazy tensor that it was made of, if any.
    """

    __slots__ = ("_asked", "_tensor", "above", "beside", "by_node", "extended", "used")

    def __init__(self, tensor: LazyTensor, above: Place | None) -> None:
        self._tensor, self.above = weakref.ref(tensor), above
        #: Further ones that it was made of, as by ``torch.cat``.
        self.beside: tuple[Place, ...] = ()
        #: Whether it has been passed by, and whether others have been derived from it.
        self.used = self.extended = False
        #: Whether dense values are a function of the node in any case, as of all that is made of the tensor.
        self.by_node: bool = above is not None and above.by_node
        self._asked = False

    @property
    def tensor(self) -> LazyTensor | None:
        """The lazy tensor, if somebody holds it still."""
        return self._tensor()

    def use(self) -> None:
        """Note that a reader bypasses the tensor and reads what it holds."""
        place: Place | None = self
        while place is not None and not place.used:
            place.used = True
            for other in place.beside:
                other.use()
            place = place.above

    def ask(self) -> None:
        """Note that somebody wants the gradient."""
        self._asked = True

    @property
    def is_wanted(self) -> bool:
        """Whether somebody wants the gradient of this tensor or of one above it."""
        places, seen = [self], set()
        while places:
            place: Place | None = places.pop()
            while place is not None and place not in seen:
                if place._asked:
                    return True
                tensor = place._tensor()
                if tensor is not None:
                    with torch._C.DisableTorchFunctionSubclass():
                        if tensor.retains_grad:  # by Tensor.backward(inputs=...), which asks nobody
                            return True
                seen.add(place)
                places += place.beside
                place = place.above
        return False


class _Values(torch.autograd.Function):
    """Dense values of a lazy tensor, as a function of the tensor itself: their gradient is one of its node."""

    @staticmethod
    def forward(ctx: Any, lazy: Tensor, values: Tensor) -> Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Storage:
    """What views of one lazy tensor have in common: the dense values, once somebody has asked for them."""

    __slots__ = ("dense", "version", "views")

    def __init__(self) -> None:
        self.dense: Tensor | None = None
        self.version = 0
        self.views: list[weakref.ref[LazyTensor]] = []

    @property
    def shared(self) -> bool:
        """Whether a change in place would be seen by more than one tensor."""
        return len(self.views) > 1 and sum(ref() is not None for ref in self.views) > 1

    @property
    def changed(self) -> bool:
        """Whether the dense values were changed in place."""
        return self.dense is not None and self.dense._version != self.version


#: Functions of several tensors, and what makes a lazy tensor of lazy ones in their place, or NotImplemented.
COMBINATIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


class LazyTensor(torch.Tensor):
    """Base of the tensors that hold less than they show. A subclass defines ``__new__`` and ``_apply``.

    The former makes the tensor a node of the graph: a function of the one that it was derived from, if there is one,
    else of what its values are computed from.

    Args:
        held: What it holds.
        view_of: The lazy tensor of which it shows the same values in another shape, if any.
        made_of: The lazy tensor that it was derived from, if any.
        **how: For the subclass.
    """

    held: Held
    place: Place
    _storage: _Storage
    _own_dense: Tensor | None
    _view_of: weakref.ref[LazyTensor] | None

    def __init__(
        self, held: Held, view_of: LazyTensor | None = None, made_of: LazyTensor | None = None, **how: Any
    ) -> None:
        self.held = held
        above = view_of if made_of is None else made_of
        self.place = Place(self, None if above is None else above.place)
        self._storage = _Storage() if view_of is None else view_of._storage
        self._storage.views.append(self.place._tensor)
        self._own_dense = None
        self._view_of = None if view_of is None else view_of.place._tensor
        if held.may_change:
            wait(self.place._tensor)

    @property
    def is_lazy(self) -> bool:
        """Whether the dense tensor, or that of a view of it, is yet to be computed."""
        return self._storage.dense is None

    @property
    def _acts(self) -> bool:
        """Whether functions that know the tensor may act on what it holds."""
        # Under no_grad the result must have no history, but what is held has one: compute it densely.
        return self.is_lazy and torch.is_grad_enabled()

    def dense(self) -> Tensor:
        """The ordinary tensor. Computed once: whatever changes it in place is seen by all later readers."""
        if self._own_dense is None:
            storage, with_history = self._storage, torch.is_grad_enabled()
            # The first to look may stand under no_grad (a metric), the next one may be the loss.
            with torch.inference_mode(False), torch.enable_grad():
                base = None if self._view_of is None else self._view_of()
                if storage.dense is None and base is not None:
                    base.dense()
                if storage.dense is None:
                    storage.dense = self._computed(with_history)
                    storage.version = storage.dense._version
                # One and the same for all who ask: hooks that one of them sets belong to what others read.
                dense = storage.dense
                self._own_dense = dense if dense.shape == self.held.shape else dense.view(self.held.shape)
        return self._own_dense

    def as_made(self) -> Tensor:
        """The dense tensor for what was made of it before, without the changes in place since."""
        return self.held.compute() if self._storage.changed else self.dense()

    def _computed(self, with_history: bool) -> Tensor:
        # One who looks without gradients may be a function with a backward of its own, whose gradient comes to the
        # node of this tensor.
        if self.place.used or self.place.by_node or not with_history:
            return self._as_function_of_itself()
        return self._dense_from_above()

    def _as_function_of_itself(self) -> Tensor:
        self.place.use()
        with torch.no_grad():
            values = self.held.compute()
        return _Values.apply(self, values)

    def _dense_from_above(self) -> Tensor:
        """The dense tensor as a function of those that it was derived from, as far as somebody holds them."""
        return self.held.compute()

    def in_graph(self) -> Tensor:
        """The tensor that hooks belong to: the dense one, or this one if what it holds has been read past it."""
        if self.place.used and not self._storage.changed:
            self.place.ask()
            return self
        return self.dense()

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Result of ``func(self, *args, **kwargs)`` without the dense tensor, or NotImplemented."""
        raise NotImplementedError

    def _read_by(self, name: str) -> None:
        """Called before a function of that name reads the dense tensor."""

    @classmethod
    @run_eagerly
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in OF_THE_GRAPH or func in BACKWARD:
            return cls._ask_the_graph(func, args, kwargs)
        combine = COMBINATIONS.get(func)
        if combine is not None and torch.is_grad_enabled():
            result = combine(*args, **kwargs)
            if result is not NotImplemented:
                return result
        first = args[0] if args else None
        if isinstance(first, LazyTensor) and first._acts:
            result = first._apply(func, args[1:], kwargs)
            if result is not NotImplemented:
                return result

        def read(x: Any) -> Any:
            if isinstance(x, LazyTensor):
                x._read_by(getattr(func, "__name__", str(func)))
            return as_dense(x)

        return func(*tree_map(read, args), **tree_map(read, kwargs))

    @staticmethod
    def _ask_the_graph(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Functions about gradients: they mean the node that gradients reach."""

        def node(x: Any) -> Any:
            return x.in_graph() if isinstance(x, LazyTensor) else x

        inputs = BACKWARD.get(func)
        args = tuple(
            tree_map(node if inputs is None or inputs == i else as_dense, argument) for i, argument in enumerate(args)
        )
        kwargs = {name: tree_map(node if name == "inputs" else as_dense, value) for name, value in kwargs.items()}
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a static method there
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reached past ``__torch_function__``, below autograd: plain values; the node keeps the history."""

        def values(x: Any) -> Any:
            if not isinstance(x, LazyTensor):
                return x
            x.place.use()
            return (x.held.compute() if x.is_lazy else x.dense()).detach()

        return func(*tree_map(values, args), **tree_map(values, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # not annotated there
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


def as_dense(x: Any) -> Any:
    """The ordinary tensor of a lazy one; anything else as it is."""
    return x.dense() if isinstance(x, LazyTensor) else x


def is_ordinary(x: Tensor) -> bool:
    """Whether layers that skip know what to do with a tensor: a lazy one, or a strided one of no class of others'."""
    kind = type(x)
    if kind is Tensor or kind is torch.nn.Parameter:
        return x.layout is torch.strided and not x.is_nested
    return isinstance(x, LazyTensor)


def version_of(x: Tensor) -> int:
    """Number of changes in place; tensors of the inference mode do not count them."""
    return 0 if x.is_inference() else x._version


def shape_of(x: Tensor) -> tuple[int, ...]:
    """Shape, without the detour by Python that a lazy tensor's attributes take."""
    return tuple(x.held.shape) if isinstance(x, LazyTensor) else tuple(x.shape)


def is_pointwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether ``func(x, *args, **kwargs)`` may act on kept values of ``x`` as long as the dropout is yet to come."""
    if func in PRELU:
        weight = args[0] if args else kwargs.get("weight")
        return isinstance(weight, Tensor) and not isinstance(weight, LazyTensor) and weight.numel() == 1
    return func in POINTWISE and not has_tensor((*args, *kwargs.values()))
