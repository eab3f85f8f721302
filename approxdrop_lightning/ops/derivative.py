"""Higher-order derivatives, and derivatives under ``torch.func``, of the custom autograd functions.

The backward passes of this package work on kept values only and are not differentiable. Wherever more than a gradient
is requested, the derivative of the masked form, which consists of native PyTorch functions, takes their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

#: For draws from a private generator, which transforms would otherwise treat as random functions of their own.
outside_of_transforms = temporarily_clear_interpreter_stack
# Bound once, since every layer calls them several times per step.
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def is_transformed() -> bool:
    """Whether the code runs under a ``torch.func`` transform or forward-mode AD."""
    return _innermost_transform() is not None or forward_ad._current_level >= 0


def batch_of_transforms() -> tuple[tuple[int, ...], Callable[[Tensor], Tensor]]:
    """Batch sizes of the active ``torch.vmap(..., randomness="different")`` levels.

    Returns:
        The batch sizes, outermost level first; and a function that takes a tensor with these sizes as its leading
        dimensions and maps each of them to its level.
    """
    functorch = torch._C._functorch
    found = []
    for interpreter in functorch.get_interpreter_stack() or []:
        if interpreter.key() == functorch.TransformType.Vmap:
            level = functorch.CVmapInterpreterPtr(interpreter)
            if level.randomness() == functorch.RandomnessType.Different:
                found.append((level.batchSize(), level.level()))

    def by_level(x: Tensor) -> Tensor:
        for _, level in found:
            x = functorch._add_batch_dim(x, 0, level)
        return x

    return tuple(size for size, _ in found), by_level


def must_be_differentiable(grad: Tensor) -> bool:
    """Whether the calling backward pass must itself be differentiable, or receives a batch of gradients."""
    return torch.is_grad_enabled() or _innermost_transform() is not None or _is_batched(grad)


def vjp(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Tensor | Sequence[Tensor | None] | None,
) -> list[Tensor | None]:
    """Compute the vector-Jacobian product of a function within a backward pass.

    Args:
        function: Maps the inputs to one tensor or several.
        inputs: Arguments of the function, treated as leaves.
        wanted: For each input, whether its gradient is needed.
        grads: Gradient of each output, or None.

    Returns:
        One gradient per input, None where it is not needed. Differentiable if the backward pass has to be.
    """
    twice = torch.is_grad_enabled()

    def alone(x: Tensor | None, want: bool) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return x
        # A separate view of each input: dependencies among the inputs are not part of the function.
        return x.view_as(x) if twice and x.requires_grad else x.detach().requires_grad_(want)

    with torch.enable_grad():
        sources = [alone(x, want) for x, want in zip(inputs, wanted, strict=True)]
        results = function(*sources)
        results = [results] if isinstance(results, Tensor) else list(results)
        given = [grads] if grads is None or isinstance(grads, Tensor) else list(grads)
        pairs = [(y, g) for y, g in zip(results, given, strict=True) if g is not None and y.requires_grad]
        asked = {i: x for i, (x, want) in enumerate(zip(sources, wanted, strict=True)) if want and x is not None}
        found: list[Tensor | None] = [None] * len(sources)
        if pairs and asked:
            gradients = torch.autograd.grad(
                [y for y, _ in pairs],
                list(asked.values()),
                [g for _, g in pairs],
                create_graph=twice,
                allow_unused=True,
            )
            for i, gradient in zip(asked, gradients, strict=True):
                found[i] = gradient
    return found
