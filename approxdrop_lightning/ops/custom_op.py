"""Custom operators that bypass the dispatcher in plain eager mode.

Calling an operator through ``torch.library`` takes the host 0.1 to 0.2 ms, as long as an entire product on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Shape of an operand, as FLOP formulas receive it.
Shape = Sequence[int]


class CustomOp:
    """A function that is also registered as a PyTorch operator, for compilers, FLOP counters and transforms.

    Attributes:
        function: The implementation; it must not modify its arguments.
        op: The registered operator.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.op = torch.library.custom_op(name, mutates_args=())(function)
        self._differentiable: type[torch.autograd.Function] | None = None
        self._casts = False

    def __call__(self, *args: Any) -> Any:
        """Call the function, going through the dispatcher only if something needs to see the operator."""
        if _is_watched(args):
            return self.op(*args)
        function = self.function if self._differentiable is None else self._differentiable.apply
        if self._casts:
            device_type = next(a for a in args if isinstance(a, Tensor)).device.type
            if torch.is_autocast_enabled(device_type):
                args = _cast(args, torch.get_autocast_dtype(device_type))
                with torch.autocast(device_type, enabled=False):
                    return function(*args)
        return function(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """See ``torch.library.register_fake``."""
        return self.op.register_fake(function)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """See ``torch.library.register_autograd``; here gradients of unused results are None in eager mode."""
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
                # For an argument that is a list of tensors, torch.library expects a list of gradients.
                return tuple(None if isinstance(g, list) else g for g in backward(ctx, *grads))

        self._differentiable = Differentiable

    def register_autocast(self) -> None:
        """Cast floating-point operands under ``torch.autocast``, as for a linear layer.

        ``torch.library.register_autocast`` fixes the type at registration, but users of ``torch.autocast`` choose it.
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
    """Decorator that registers a function as an operator, like ``torch.library.custom_op``."""
    return lambda function: CustomOp(name, function)


def _is_watched(args: tuple[Any, ...]) -> bool:
    """Whether a compiler, a dispatch mode, a function transform or a tensor subclass needs to see the operator."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(a, Tensor) and type(a) not in (Tensor, torch.nn.Parameter) for a in args)
    )


def _cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
