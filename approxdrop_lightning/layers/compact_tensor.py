"""What a site returns: a dropped-out tensor that holds, or will hold, kept values only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

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
    saving_as_where,
    saving_hooks,
)
from approxdrop_lightning.patterns.row import RowPattern

_SCALES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div, Tensor.__truediv__}


class Reader(Protocol):
    """The site, as seen from here: told who reads what it has dropped from."""

    backend: str

    def read_kept(self, name: str) -> None:
        """A layer of that name reads kept values only."""

    def read_whole(self, name: str) -> None:
        """A function of that name reads the dense tensor."""

    def saves_too_few(self, multiplies: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a product of so many multiplies had better read the dense tensor."""


class Kept:
    """What a :class:`CompactTensor` holds.

    Args:
        shape: Shape that is shown, ``[..., n]``.
        pattern: What is kept of the ``n`` units.
        rows: Leading shape by which the pattern groups the rows; a later view may show another one.
        site: The site that drops; it is told who reads.
        given: Kept values as :func:`approxdrop_lightning.functional.pack` returns them, scaled.
        packed: Whether it is these; else it is the dense tensor to drop from, packed only if a consumer asks.
        scale: Factor of the kept entries of the dense tensor.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        pattern: RowPattern,
        rows: tuple[int, ...],
        site: Reader,
        given: Tensor,
        packed: bool = True,
        scale: float = 1.0,
    ) -> None:
        self.shape, self.pattern, self.rows, self.site = shape, pattern, rows, site
        self._given, self._packed, self._scale = given, packed, scale
        self._values = given if packed else None
        self.dtype, self.device = given.dtype, given.device
        self._hooks = saving_hooks()

    @property
    def has_values(self) -> bool:
        """Whether kept values are there already."""
        return self._values is not None

    @property
    def values(self) -> Tensor:
        """Kept values, scaled."""
        if self._values is None:
            with saving_as_where(self._hooks):
                values = functional.pack(self._given, self.pattern, self.site.backend)
                self._values = values if self._scale == 1.0 else values * self._scale
        return self._values

    def inputs(self) -> tuple[Tensor]:
        return (self._given,)

    def compute(self) -> Tensor:
        with saving_as_where(self._hooks):
            if self._packed:
                dense = functional.unpack(self._given, self.pattern, self.rows, self.site.backend)
            else:
                given = self._given
                dense = given * self.pattern.mask(
                    *self.rows, dtype=given.dtype, value=self._scale, device=given.device
                )
            return dense.view(self.shape)

    def with_values(self, values: Tensor, shape: tuple[int, ...]) -> Kept:
        """The same pattern with other values, shown in another shape."""
        return Kept(shape, self.pattern, self.rows, self.site, values)


class CompactTensor(LazyTensor):
    """Output of dropout. Consumers read what it holds; everybody else sees zeros filled in."""

    held: Kept

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.linear:
            return self.linear(*args, **kwargs)
        if func in _SCALES and len(args) == 1 and isinstance(args[0], (int, float)) and not kwargs:
            # inf and 0 divisors make NaN of a dropped zero: let the dense tensor show it.
            if math.isfinite(args[0]) and (args[0] != 0 or func not in (torch.div, Tensor.div, Tensor.__truediv__)):
                return self._with(func(self.held.values, *args))
        elif func in KEEPS_ZERO and not has_tensor((*args, *kwargs.values())) and not kwargs.get("inplace"):
            return self._with(func(self.held.values, *args, **kwargs))
        elif func in RESHAPES:
            shape = reshaped_leading(func, self.held.shape, args, kwargs)
            if shape is not None:
                return CompactTensor(self.held.with_values(self.held.values, shape), view_of=self)
        return NotImplemented

    def serves(self, multiplies: int) -> bool:
        """Whether a product of so many multiplies had better read kept values, as it does if they are packed."""
        held = self.held
        if not self.is_lazy or held.has_values:
            return self.is_lazy
        return not held.site.saves_too_few(multiplies, held.device, held.dtype)

    def _read_by(self, name: str) -> None:
        self.held.site.read_whole(name)

    def _with(self, values: Tensor) -> CompactTensor:
        return CompactTensor(self.held.with_values(values, self.held.shape))

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        reader: str = "F.linear",
    ) -> Tensor:
        """``F.linear(self, weight, bias)``, reading only the columns of the weight that are kept."""
        held = self.held
        held.site.read_kept(reader)
        y = functional.row_linear(
            held.values, weight, bias, held.pattern, backend=held.site.backend, leading_shape=held.rows
        )
        return y.view(*held.shape[:-1], weight.shape[0])
