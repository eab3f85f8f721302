"""What a site returns: a dropped-out tensor that holds, or will hold, kept values only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning import functional
from approxdrop_lightning.layers.lazy_tensor import (
    KEEPS_ZERO,
    RESHAPES,
    LazyTensor,
    has_tensor,
    reshaped_leading,
)
from approxdrop_lightning.pattern import RowPattern

_SCALES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div, Tensor.__truediv__}


class CompactTensor(LazyTensor):
    """Output of dropout. Consumers read :attr:`values`; everybody else sees zeros filled in.

    Args:
        shape: Shape that it shows, ``[..., n]``.
        pattern: What is kept of the ``n`` units.
        rows: Leading shape by which the pattern groups the rows; a later view may show another one.
        values: Kept values as :func:`approxdrop_lightning.functional.pack` returns them, scaled.
        source: Instead of values: the dense tensor to drop from, packed only if a consumer asks.
        scale: Factor of the kept entries of ``source``.
        on_read: Called with the name of whoever reads: the consumer's, or a function's that made it dense.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor, *args: Any, **kwargs: Any) -> CompactTensor:
        return LazyTensor.__new__(cls, shape, like.dtype, like.device)

    def __init__(
        self,
        shape: tuple[int, ...],
        like: Tensor,
        pattern: RowPattern,
        rows: tuple[int, ...],
        values: Tensor | None = None,
        source: Tensor | None = None,
        scale: float = 1.0,
        backend: str = "auto",
        on_read: Callable[[str], None] = lambda name: None,
    ) -> None:
        super().__init__()
        self.pattern, self.rows = pattern, rows
        self.backend, self.on_read = backend, on_read
        self._values, self._source, self._scale = values, source, scale

    @property
    def values(self) -> Tensor:
        """Kept values, scaled: ``[*rows, n_kept]`` if the pattern is shared, else flat, group after group."""
        if self._values is None:
            values = functional.pack(self._source, self.pattern, self.backend)
            self._values = values if self._scale == 1.0 else values * self._scale
        return self._values

    def _compute(self) -> Tensor:
        if self._values is None:
            mask = self.pattern.mask(*self.rows).to(self._source.device)
            dense = self._source * (mask.to(self._source.dtype) * self._scale)
        else:
            dense = functional.unpack(self._values, self.pattern, self.rows, self.backend)
        return dense.view(self.shape)

    def _with(self, values: Tensor, shape: tuple[int, ...]) -> CompactTensor:
        return CompactTensor(
            shape, values, self.pattern, self.rows, values, backend=self.backend, on_read=self.on_read
        )

    def _apply(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func is F.linear:
            return self.linear(*args, **kwargs)
        if func in _SCALES and len(args) == 1 and isinstance(args[0], (int, float)) and not kwargs:
            # inf and 0 divisors make NaN of a dropped zero: let the dense tensor show it.
            if math.isfinite(args[0]) and (args[0] != 0 or func not in (torch.div, Tensor.div, Tensor.__truediv__)):
                return self._with(func(self.values, *args), tuple(self.shape))
        elif func in KEEPS_ZERO and not has_tensor((*args, *kwargs.values())) and not kwargs.get("inplace"):
            return self._with(func(self.values, *args, **kwargs), tuple(self.shape))
        elif func in RESHAPES:
            shape = reshaped_leading(func, tuple(self.shape), args, kwargs)
            if shape is not None:
                return self._with(self.values, shape)
        self.on_read(getattr(func, "__name__", str(func)))
        return NotImplemented

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        reader: str = "F.linear",
    ) -> Tensor:
        """``F.linear(self, weight, bias)``, reading only the columns of the weight that are kept."""
        self.on_read(reader)
        y = functional.row_linear(
            self.values, weight, bias, self.pattern, backend=self.backend, leading_shape=self.rows
        )
        return y.view(*self.shape[:-1], weight.shape[0])
