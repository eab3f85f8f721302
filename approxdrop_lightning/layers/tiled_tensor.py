"""What a site returns that drops weights: its input as it is, marked for the layers that read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning import functional
from approxdrop_lightning.layers.lazy_tensor import (
    RESHAPES,
    LazyTensor,
    reshaped_leading,
    saving_as_where,
    saving_hooks,
)
from approxdrop_lightning.patterns.tile import BernoulliPattern, TilePattern
from approxdrop_lightning.work import Ledger

#: Patterns of one use of a site: by reader and shape of what it drops from.
Use = dict[tuple[str, int, int], TilePattern | BernoulliPattern]


class WeightDropper(Protocol):
    """The site, as seen from here."""

    backend: str
    rate: float

    @property
    def scale(self) -> float:
        """Factor of the kept weights."""

    def weights(self, use: Use, reader: str, weight: Tensor) -> TilePattern | BernoulliPattern:
        """The pattern of a reader's weight."""

    def units(self, use: Use, rows: int, n: int) -> TilePattern | BernoulliPattern:
        """The pattern of units for those that have no weight."""

    def read_by(self, name: str, weight: Tensor, dense: str | None = None) -> bool:
        """A layer of that name reads with part of its weight; returns whether the rest is skipped."""

    def read_whole(self, name: str) -> None:
        """A function of that name reads the dense tensor."""


class Marked:
    """What a :class:`TiledTensor` holds.

    Args:
        source: The site's input, ``[..., n]``.
        site: The site.
        use: Patterns of this use of it.
    """

    def __init__(self, source: Tensor, site: WeightDropper, use: Use) -> None:
        self.source, self.site, self.use = source, site, use
        self.shape, self.dtype, self.device = tuple(source.shape), source.dtype, source.device
        self.with_history = torch.is_grad_enabled()
        self._hooks = saving_hooks()

    def inputs(self) -> tuple[Tensor]:
        return (self.source,)

    def compute(self) -> Tensor:
        """Conventional dropout of the units."""
        n = self.shape[-1]
        pattern = self.site.units(self.use, self.source.numel() // n, n)
        with saving_as_where(self._hooks):
            mask = pattern.mask(self.source.device).view(self.shape).to(self.source.dtype)
            return self.source * (mask / (1 - self.site.rate))


class TiledTensor(LazyTensor):
    """Input of a layer that is to drop weights. Such layers read the values; everybody else sees units dropped."""

    held: Marked

    @property
    def is_marked(self) -> bool:
        """Whether a layer may drop weights.

        Not if the dense values were changed in place: it must see them. And not under ``no_grad`` if the mark was set
        without: re-entrant checkpointing hands the dense tensor on when it computes such a layer again.
        """
        dense = self._storage.dense
        changed = dense is not None and dense._version > 0
        return not changed and (torch.is_grad_enabled() or not self.held.with_history)

    @property
    def _acts(self) -> bool:
        return self.is_marked

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.linear and (args[0] if args else kwargs["weight"]).dim() == 2:
            return self.linear(*args, **kwargs)
        if func in RESHAPES:
            shape = reshaped_leading(func, self.held.shape, args, kwargs)
            if shape is not None:
                held = self.held
                return TiledTensor(Marked(held.source.reshape(shape), held.site, held.use), view_of=self)
        return NotImplemented

    def _read_by(self, name: str) -> None:
        self.held.site.read_whole(name)

    def linear(
        self, weight: Tensor, bias: Tensor | None = None, reader: str = "F.linear", work: Ledger | None = None
    ) -> Tensor:
        """``F.linear(self, weight, bias)`` with weights dropped; ``work`` is told its multiplies."""
        source, site = self.held.source, self.held.site
        pattern = site.weights(self.held.use, reader, weight)
        skipped = site.read_by(reader, weight)
        if work is not None and torch.is_grad_enabled():
            work.note(site if skipped else None, None, source.numel() * weight.shape[0])
        return functional.tile_linear(
            source, weight, bias, pattern, site.scale, site.backend if skipped else "reference"
        )

    def masked_weight(self, weight: Tensor, reader: str, why: str) -> Tensor:
        """The weight of a product that is computed densely, for the reason given: dropped weights are zero in it."""
        site = self.held.site
        site.read_by(reader, weight, dense=why)
        return functional.masked_weight(weight, site.weights(self.held.use, reader, weight), site.scale)
