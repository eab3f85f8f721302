"""A tensor that is dense to whoever looks, and cheaper to those who know it.

Model code between a producer, a dropout and its consumers is arbitrary Python. So that it may stay as it is,
the layers hand each other subclasses of ``torch.Tensor`` with the full shape and dtype. A function that a
subclass knows is computed on what it holds; to every other function it is the dense tensor, autograd included.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map


def _overloads(*names: str) -> frozenset[Callable[..., Any]]:
    """The forms of each function that PyTorch hands to ``__torch_function__``."""
    homes = (F, torch, Tensor)
    return frozenset(getattr(home, name) for name in names for home in homes if hasattr(home, name))


#: Functions of one value with f(0) = 0: they may act on kept values alone, before or after dropout.
KEEPS_ZERO = _overloads(
    "relu", "relu6", "gelu", "tanh", "silu", "leaky_relu", "elu", "selu", "celu", "hardswish", "mish", "softsign",
    "tanhshrink", "abs", "neg", "square", "sin",
)  # fmt: skip
#: Functions of one value: they may act on kept values alone as long as the dropout is yet to come.
POINTWISE = KEEPS_ZERO | _overloads(
    "sigmoid", "logsigmoid", "softplus", "hardsigmoid", "hardtanh", "exp", "cos", "add", "sub", "mul", "div", "clamp",
)  # fmt: skip
#: They rearrange the leading dimensions, or everything; which of both their result's shape tells.
RESHAPES = _overloads("view", "reshape", "flatten", "unsqueeze", "squeeze")
#: Answered from the shape, dtype and device, without computing anything.
_METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf", "is_sparse",
                 "is_quantized", "is_meta", "is_nested")
) | {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__,
     Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel}  # fmt: skip


_Function = TypeVar("_Function", bound=Callable[..., Any])


def run_eagerly(function: _Function) -> _Function:
    """Let a function run eagerly under ``torch.compile``: a visible graph break.

    Tracing would make constants of the patterns, hence a new graph for each until the limit, and then silence.
    """
    return torch.compiler.disable(function, reason="patterns change with every batch")


def saving_hooks() -> Any:
    """Who packs the tensors that autograd saves at this point; None: nobody."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def saving_as_where(hooks: Any) -> contextlib.AbstractContextManager[None]:
    """Save past hooks that were not there when what is computed now was called for.

    Non-reentrant checkpointing counts what is saved between the ends of a segment, and must find the same when it
    computes the segment again: what began to wait before the segment is none of its.
    """
    if saving_hooks() == hooks:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_identity, _identity)


def _identity(x: Any) -> Any:
    return x


class Held(Protocol):
    """What a lazy tensor holds instead of its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def inputs(self) -> tuple[Tensor | None, ...]:
        """Tensors that the values are computed from."""

    def compute(self) -> Tensor:
        """The dense tensor, as a differentiable function of the inputs."""


class _Show(torch.autograd.Function):
    """Makes the lazy tensor a function of what it holds, for callers that take no detour by Python.

    A gradient arrives here only through such a caller (a custom ``autograd.Function``, a backward hook); all
    others go on with what is held.
    """

    @staticmethod
    def forward(ctx: Any, cls: type, held: Held, *inputs: Tensor | None) -> Tensor:
        ctx.held = held
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.held.inputs()
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        with torch.enable_grad():
            dense = ctx.held.compute()
        found = torch.autograd.grad(dense, [inputs[i] for i in wanted], grad, allow_unused=True)
        grads: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(wanted, found, strict=True):
            grads[i] = gradient
        return None, None, *grads


class _Storage:
    """What views of one lazy tensor have in common: the dense values, once somebody has asked for them."""

    def __init__(self) -> None:
        self.dense: Tensor | None = None
        self._views: list[weakref.ref[LazyTensor]] = []

    def add(self, view: LazyTensor) -> None:
        self._views = [ref for ref in self._views if ref() is not None] + [weakref.ref(view)]

    @property
    def shared(self) -> bool:
        """Whether a change in place would be seen by more than one tensor."""
        return sum(ref() is not None for ref in self._views) > 1


class LazyTensor(torch.Tensor):
    """Base of the tensors that hold less than they show. A subclass defines ``_apply``.

    Args:
        held: What it holds.
        view_of: The lazy tensor of which it shows the same values in another shape, if any.
    """

    held: Any
    _storage: _Storage

    @staticmethod
    def __new__(cls, held: Held, view_of: LazyTensor | None = None) -> LazyTensor:
        return _Show.apply(cls, held, *held.inputs())

    def __init__(self, held: Held, view_of: LazyTensor | None = None) -> None:
        self.held = held
        self._storage = _Storage() if view_of is None else view_of._storage
        self._storage.add(self)

    @property
    def is_lazy(self) -> bool:
        """Whether nobody has asked for the dense tensor, or for that of a view of it, yet."""
        return self._storage.dense is None

    @property
    def _acts(self) -> bool:
        """Whether functions that know the tensor may act on what it holds."""
        # Under no_grad the result must have no history, but what is held has one: compute it densely.
        return self.is_lazy and torch.is_grad_enabled()

    def dense(self) -> Tensor:
        """The ordinary tensor. Computed once: whatever changes it in place is seen by all later readers."""
        storage = self._storage
        if storage.dense is None:
            # The first to look may stand under no_grad (a metric), the next one may be the loss.
            with torch.inference_mode(False), torch.enable_grad():
                storage.dense = self.held.compute()
        dense = storage.dense
        return dense if dense.shape == self.held.shape else dense.view(self.held.shape)

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
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
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

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a static method there
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reached past ``__torch_function__``, below autograd: plain values, history is kept by :class:`_Show`."""

        def values(x: Any) -> Any:
            if not isinstance(x, LazyTensor):
                return x
            return (x.held.compute() if x.is_lazy else x.dense()).detach()

        return func(*tree_map(values, args), **tree_map(values, kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # not annotated there
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"


def as_dense(x: Any) -> Any:
    """The ordinary tensor of a lazy one; anything else as it is."""
    return x.dense() if isinstance(x, LazyTensor) else x


def shape_of(x: Tensor) -> tuple[int, ...]:
    """Shape, without the detour by Python that a lazy tensor's attributes take."""
    return tuple(x.held.shape) if isinstance(x, LazyTensor) else tuple(x.shape)


def has_tensor(args: Any) -> bool:
    """Whether a tensor is among the arguments: then the function is not one of a single value."""
    return any(isinstance(a, Tensor) for a in args)


def reshaped_leading(
    func: Callable[..., Any], shape: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, ...] | None:
    """New shape, if a reshaping leaves the last dimension (and so each row) as it is; else None."""
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        return None
    out = tuple(func(torch.empty(shape, device="meta"), *args, **kwargs).shape)
    return out if out and shape and out[-1] == shape[-1] else None
