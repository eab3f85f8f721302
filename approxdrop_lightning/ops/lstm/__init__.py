"""LSTM recurrence over precomputed gate inputs: defined by :mod:`.reference`, computed by the backends next to it."""

from __future__ import annotations

import torch
from torch import Tensor

from approxdrop_lightning.ops.backend import has_triton
from approxdrop_lightning.ops.derivative import is_transformed
from approxdrop_lightning.ops.lstm import compact, reference


def sequence(
    gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence with the fastest backend for these tensors.

    Args:
        gates: ``[T, B, 4 * H]``: input product plus biases, in the order i, f, g, o.
        h0: ``[B, H]``.
        c0: ``[B, H]``.
        weight: ``[4 * H, K]``.
        kept: The ``K`` recurrent inputs that ``weight`` reads, int64, or None for all.

    Returns:
        ``(h, h_T, c_T)`` of shapes ``[T, B, H]``, ``[B, H]`` and ``[B, H]``.
    """
    if is_transformed():
        return reference.sequence(gates, h0, c0, weight, kept)
    if _has_kernels(gates):
        from approxdrop_lightning.ops.lstm import lstm_ops

        return lstm_ops.sequence(gates, h0, c0, weight, kept)
    return compact.sequence(gates, h0, c0, weight, kept)


def _has_kernels(gates: Tensor) -> bool:
    """Whether the Triton kernels support these gates."""
    return gates.is_cuda and gates.dtype != torch.float64 and has_triton()
