"""Weights of an LSTM layer in one contiguous buffer, the layout that cuDNN expects."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _FlatWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: Tensor | None, weight_ih: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(kept)
        ctx.shape = tuple(weight_ih.shape)
        columns = weight_ih.shape[1] if kept is None else len(kept)
        shapes = [(weight_ih.shape[0], columns), *(tuple(other.shape) for other in others)]
        sizes = [math.prod(shape) for shape in shapes]
        parts = weight_ih.new_empty(sum(sizes)).split(sizes)
        first, *rest = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        if kept is None:
            first.copy_(weight_ih)
        else:
            torch.index_select(weight_ih, 1, kept, out=first)
        for target, other in zip(rest, others, strict=True):
            target.copy_(other)
        return first, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight_ih: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        if kept is not None:
            dweight_ih = dweight_ih.new_zeros(ctx.shape).index_copy_(1, kept, dweight_ih)
        return None, dweight_ih, *others


def flat_weights(kept: Tensor | None, weight_ih: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Copy the weights of an LSTM layer, but only the kept columns of ``weight_ih``, into one contiguous buffer.

    cuDNN uses weights in this layout (input before recurrent, matrices before biases) in place. It gathers weights in
    any other layout on each call, with a warning.

    Args:
        kept: Columns of ``weight_ih`` to keep, int64, or None for all.
        weight_ih: ``[4 * H, n_in]``; its gradient is dense.
        *others: ``weight_hh``, and the input and recurrent biases if there are any.

    Returns:
        Views of the buffer, one per argument.
    """
    return _FlatWeights.apply(kept, weight_ih, *others)
