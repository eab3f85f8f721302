"""Derivatives of what is computed past autograd: of any order, and under the transforms of ``torch.func``.

The backward passes of this package compute with kept values and cannot be differentiated. Where somebody asks for
more than a gradient they give way to the derivative of the masked form, which consists of PyTorch's own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

#: For what is drawn by a generator of one's own: transforms would take it for random numbers of theirs.
outside_of_transforms = temporarily_clear_interpreter_stack
# Asked several times in each step of each layer.
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def is_transformed() -> bool:
    """Whether code runs under a transform of ``torch.func`` or with forward-mode derivatives."""
    return _innermost_transform() is not None or forward_ad._current_level >= 0


def batch_of_transforms() -> tuple[tuple[int, ...], Callable[[Tensor], Tensor]]:
    """Samples over which ``torch.vmap(..., randomness="different")`` maps what runs now, level by level.

    Returns:
        Their numbers, of the outer level first; and what makes of a tensor that has these as its first dimensions one
        whose samples go to those of each level.
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
    """Whether a backward pass, which asks this, must itself be differentiable, or is for a batch of gradients."""
    return torch.is_grad_enabled() or _innermost_transform() is not None or _is_batched(grad)


def vjp(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    grads: Tensor | Sequence[Tensor | None] | None,
) -> list[Tensor | None]:
    """Gradients of the inputs of a function, within a backward pass.

    Args:
        function: Takes the inputs; returns a tensor or several.
        inputs: Its arguments; no history of theirs is followed.
        wanted: For each of them, whether its gradient is.
        grads: Gradients of what it returns, one for each; None where there is none.

    Returns:
        As many as inputs, None for one that is not wanted. They are differentiable if the backward pass is to be.
    """
    twice = torch.is_grad_enabled()

    def alone(x: Tensor | None, want: bool) -> Tensor | None:
        if x is None or not x.is_floating_point():
            return x
        # A name of its own for each: what else leads from one of them to another is not the function's.
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
