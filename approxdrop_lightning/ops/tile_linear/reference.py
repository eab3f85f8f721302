"""Masked dense products: the definition of a linear layer with kept tiles, used as the test oracle."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning.patterns.tile import BernoulliPattern, TilePattern


def tile_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pattern: TilePattern | BernoulliPattern, scale: float
) -> Tensor:
    """See :meth:`.TileLinearBackend.tile_linear`."""
    return F.linear(x, masked_weight(weight, pattern, scale), bias)


def masked_weight(weight: Tensor, pattern: TilePattern | BernoulliPattern, scale: float) -> Tensor:
    """``scale * weight * mask``."""
    return weight * (pattern.mask(weight.device).to(weight.dtype) * scale)
