"""Which functions of PyTorch a lazy tensor can answer without its dense values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Elementwise functions that were called one after the other, each with its other arguments and keywords.
Chain = tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...]


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
RELUS = (F.relu, torch.relu, Tensor.relu)
#: ``f(x, weight)``; of one weight it is a function of one value with f(0) = 0, whose weight has a gradient.
PRELU = _overloads("prelu")
#: They rearrange the leading dimensions, or everything; which of both their result's shape tells.
RESHAPES = _overloads("view", "reshape", "flatten", "unsqueeze", "squeeze")
#: Answered from the shape, dtype and device, without computing anything.
METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf", "is_sparse",
                 "is_quantized", "is_meta", "is_nested")
) | {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__,
     Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex, torch.numel}  # fmt: skip
#: About the gradient of the tensor, or about its node.
OF_THE_GRAPH = {Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook} | {
    getter
    for name in ("grad", "grad_fn", "retains_grad", "output_nr", "_backward_hooks")
    for getter in (getattr(Tensor, name).__get__, getattr(Tensor, name).__set__)
}
#: They go back to inputs, which are the argument of this position or of the name.
BACKWARD = {torch.autograd.grad: 1, torch.autograd.backward: 5, Tensor.backward: 4}


def has_tensor(args: Any) -> bool:
    """Whether a tensor is among the arguments: then the function is not one of a single value."""
    return any(isinstance(a, Tensor) for a in args)


def reshaped(
    func: Callable[..., Any], shape: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, ...] | None:
    """New shape; None if it is not a reshaping, but another type."""
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        return None
    return tuple(func(torch.empty(shape, device="meta"), *args, **kwargs).shape)


def reshaped_leading(
    func: Callable[..., Any], shape: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, ...] | None:
    """New shape, if a reshaping leaves the last dimension (and so each row) as it is; else None."""
    out = reshaped(func, shape, args, kwargs)
    return out if out and shape and out[-1] == shape[-1] else None


def run_chain(chain: Chain, y: Tensor) -> Tensor:
    """The functions of a chain, one after the other."""
    for func, args, kwargs in chain:
        y = func(y, *args, **kwargs)
    return y


def tensors_of(chain: Chain) -> list[Tensor]:
    """Tensors among the arguments of a chain: weights of PReLUs."""
    return [a for _, args, kwargs in chain for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def with_tensors(chain: Chain, tensors: Sequence[Tensor]) -> Chain:
    """The same functions, of other tensors."""
    rest = iter(tensors)

    def other(argument: Any) -> Any:
        return next(rest, argument) if isinstance(argument, Tensor) else argument

    return tuple(
        (func, tuple(map(other, args)), {k: other(a) for k, a in kwargs.items()}) for func, args, kwargs in chain
    )


def activation_of(chain: Chain) -> str | None:
    """``"identity"`` or ``"relu"``, if a chain of elementwise functions is that; otherwise None."""
    if not chain:
        return "identity"
    (func, args, kwargs), *more = chain
    return "relu" if func in RELUS and not (more or args or any(kwargs.values())) else None
