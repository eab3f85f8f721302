"""Masked dense products: the definition of a linear layer with kept tiles, and the oracle of its tests."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning.patterns.tile import BernoulliPattern, TilePattern


def tile_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: TilePattern | BernoulliPattern, scale: float
) -> Tensor:
    """``x @ (scale * weight * mask).T + bias``.

    Args:
        x: ``[R, n_in]``.
        weight: ``[n_out, n_in]``.
        bias: ``[n_out]`` or None.
        pattern: Pattern of the weight.
        scale: Factor of the kept weights.

    Returns:
        ``[R, n_out]``.
    """
    return F.linear(x, masked_weight(weight, pattern, scale), bias)


def masked_weight(weight: Tensor, pattern: TilePattern | BernoulliPattern, scale: float) -> Tensor:
    """``scale * weight * mask``."""
    return weight * (pattern.mask(weight.device).to(weight.dtype) * scale)
