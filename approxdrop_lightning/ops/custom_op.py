"""Custom operators that bypass the dispatcher in plain eager mode.

A call through ``torch.library`` costs the host 0.1 to 0.2 ms, as much as a whole product on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class CustomOp:
    """A function that is also a PyTorch operator, for compilers, FLOP counters and function transforms.

    Attributes:
        function: The implementation; it must not modify its arguments.
        op: The registered operator.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.op = torch.library.custom_op(name, mutates_args=())(function)
        self._differentiable: Any = None
        self._casts = False

    def __call__(self, *args: Any) -> Any:
        """Call the function, through the dispatcher only where the operator must be visible."""
        if _is_watched(args):
            return self.op(*args)
        if self._casts:
            device_type = next(a for a in args if isinstance(a, Tensor)).device.type
            if torch.is_autocast_enabled(device_type):
                args = _cast(args, torch.get_autocast_dtype(device_type))
                with torch.autocast(device_type, enabled=False):
                    return self._differentiable.apply(*args)
        return self.function(*args) if self._differentiable is None else self._differentiable.apply(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As in ``torch.library``."""
        return self.op.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As in ``torch.library``, except that in eager mode the gradient of an unused result is None."""
        self.op.register_autograd(backward, setup_context=setup_context)
        function = self.function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                results = function(*args)
                setup_context(ctx, args, results)
                ctx.set_materialize_grads(False)
                return results

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                # A list of tensors among the arguments has a list of gradients for torch.library.
                return tuple(None if isinstance(g, list) else g for g in backward(ctx, *grads))

        self._differentiable = Differentiable

    def register_autocast(self) -> None:
        """Cast floating-point operands as ``torch.autocast`` casts those of a linear layer.

        ``torch.library`` registers one fixed type, but the user of ``torch.autocast`` may choose another.
        """

        def cast_for(device_type: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                with torch.autocast(device_type, enabled=False):
                    return self.op(*_cast(args, torch.get_autocast_dtype(device_type)))

            return call

        self._casts = True
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            torch.library.impl(self.op._qualname, key, cast_for(device_type))


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOp]:
    """Register a function as an operator, as ``torch.library.custom_op`` does."""
    return lambda function: CustomOp(name, function)


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether a compiler, a dispatch mode, a function transform or a tensor subclass must see the operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(a, Tensor) and type(a) not in (Tensor, torch.nn.Parameter) for a in args)
    )


def _cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
