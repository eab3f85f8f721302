"""Masked dense products: the definition of a linear layer between row patterns, used as the test oracle."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning.patterns.row import RowPattern

#: Activations that can be fused with a product.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda y: y, "relu": F.relu, "gelu": F.gelu}


def finish(y: Tensor, scale: float, activation: str) -> Tensor:
    """``act(scale * y)``."""
    return ACTIVATIONS[activation](y if scale == 1.0 else y * scale)


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """See :meth:`.RowLinearBackend.pack`."""
    return x.reshape(-1)[pattern.flat_index(tuple(x.shape[:-1])).to(x.device)]


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """See :meth:`.RowLinearBackend.unpack`."""
    dense = torch.zeros(*leading_shape, pattern.n, dtype=values.dtype, device=values.device)
    index = pattern.flat_index(leading_shape).to(values.device)
    return dense.view(-1).index_put((index,), values.reshape(-1)).view(dense.shape)


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_pattern: RowPattern | None,
    out_pattern: RowPattern | None,
    leading_shape: tuple[int, ...],
    scale: float = 1.0,
    activation: str = "identity",
) -> Tensor:
    """See :meth:`.RowLinearBackend.row_linear`."""
    dense = x if in_pattern is None else unpack(x, in_pattern, leading_shape)
    y = finish(F.linear(dense, weight, bias), scale, activation)
    return y.reshape(y.shape[:-1].numel(), y.shape[-1]) if out_pattern is None else pack(y, out_pattern)
