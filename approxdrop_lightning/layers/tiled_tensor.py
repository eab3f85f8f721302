"""Output of a tile site: the unchanged input, marked for the layers that drop weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning import functional
from approxdrop_lightning.layers.contexts import saving_as_where, saving_hooks
from approxdrop_lightning.layers.functions import RESHAPES, reshaped_leading
from approxdrop_lightning.layers.lazy_tensor import LazyTensor, version_of
from approxdrop_lightning.layers.use import Use
from approxdrop_lightning.layers.waiting import settle
from approxdrop_lightning.patterns.tile import BernoulliPattern, TilePattern
from approxdrop_lightning.work import Ledger

if TYPE_CHECKING:
    from approxdrop_lightning.layers.tile_site import TileSite

#: Patterns of one use of a site: by reader and shape of what it drops from.
Patterns = dict[tuple[str, int, int], TilePattern | BernoulliPattern]


class Marked:
    """What a :class:`TiledTensor` holds.

    Args:
        source: The site's input, ``[..., n]``.
        site: The site.
        patterns: Of this use of it.
        use: What is told who reads.
    """

    def __init__(self, source: Tensor, site: TileSite, patterns: Patterns, use: Use) -> None:
        # A name of its own: the gradient of what the layers read is that of the tensor that is marked.
        self.source, self.site = source.view_as(source), site
        self.patterns, self.use = patterns, use
        self.shape, self.dtype, self.device = tuple(source.shape), source.dtype, source.device
        self.with_history = torch.is_grad_enabled()
        self._hooks = saving_hooks()

        self._version = version_of(self.source)

    may_change = False  # nothing is computed but a product with a mask that may never be drawn

    @property
    def has_changed(self) -> bool:
        return version_of(self.source) != self._version

    def compute(self) -> Tensor:
        """Conventional dropout of the units."""
        self.check()
        with saving_as_where(self._hooks):
            return self.source * self.mask()

    def check(self) -> None:
        """Raise if the input was changed since."""
        if self.has_changed:
            raise RuntimeError(
                f"{self.site.name}: its output is read for the first time after its input was changed in place; "
                "read it before that"
            )

    def mask(self) -> Tensor:
        """Of the units, scaled."""
        n = self.shape[-1]
        pattern = self.site.units(self.patterns, math.prod(self.shape) // n, n)
        return pattern.mask(self.device).view(self.shape).to(self.dtype) / (1 - self.site.rate)


class _Units(torch.autograd.Function):
    """A marked tensor in the graph, for those who see its units dropped and read it past Python."""

    @staticmethod
    def forward(ctx: Any, cls: type, held: Marked, source: Tensor) -> Tensor:
        ctx.mask = held.mask
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        settle()
        return None, None, grad * ctx.mask()


class TiledTensor(LazyTensor):
    """Input of a layer that is to drop weights. Such layers read the values; everybody else sees units dropped."""

    held: Marked
    #: Whether its dense values are a function of its node.
    _of_itself = False

    @staticmethod
    def __new__(cls, held: Marked, view_of: LazyTensor | None = None) -> TiledTensor:
        return _Units.apply(cls, held, held.source)

    @property
    def is_marked(self) -> bool:
        """Whether a layer may drop weights.

        Not if the dense values were changed in place: it must see them. And not at the border of re-entrant
        checkpointing, neither where it computes such a layer again, handing the dense tensor on, without gradients,
        nor where what was marked without them has been given a history.
        """
        if self._handed_on:
            self._check_recomputation()
        if self._storage.changed or self._handed_on:
            return False
        return torch.is_grad_enabled() or not self.held.with_history

    @property
    def _handed_on(self) -> bool:
        """Whether it was made without gradients, and somebody else gave it a history."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.requires_grad and not self.held.with_history

    def _check_recomputation(self) -> None:
        """Raise if what is computed again would drop units where weights were dropped.

        A re-entrant checkpoint within another one runs its first forward without gradients around it, where nothing
        marks its border; the second forward, within the backward pass, hands this tensor over the border.
        """
        within_backward = torch._C._current_graph_task_id() != -1
        if within_backward and any(reader for reader, _, _ in self.held.patterns):
            raise RuntimeError(
                f"{self.held.site.name}: its output crosses the border of a re-entrant checkpoint that is within "
                "another one, so weights were dropped in the forward pass and units would be in the recomputation; "
                "use checkpoint(..., use_reentrant=False)"
            )

    @property
    def _acts(self) -> bool:
        return self.is_marked

    def _computed(self, with_history: bool) -> Tensor:
        if self._handed_on:
            self._check_recomputation()
        if self._handed_on or not with_history:
            self._of_itself = True
            return self._as_function_of_itself()
        return self.held.compute()

    def in_graph(self) -> Tensor:
        if self._of_itself and not (self._handed_on or self._storage.changed):
            return self
        if self.is_lazy or (self.place.used and not self._of_itself):
            return self.held.source  # layers read it, or will
        return self.dense()

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is F.linear and (args[0] if args else kwargs["weight"]).dim() == 2:
            return self.linear(*args, **kwargs)
        if func in RESHAPES:
            shape = reshaped_leading(func, self.held.shape, args, kwargs)
            if shape is not None:
                held = self.held
                return TiledTensor(
                    Marked(held.source.reshape(shape), held.site, held.patterns, held.use), view_of=self
                )
        return NotImplemented

    def _read_by(self, name: str) -> None:
        self.held.use.read_whole(name)

    def linear(
        self, weight: Tensor, bias: Tensor | None = None, reader: str = "F.linear", work: Ledger | None = None
    ) -> Tensor:
        """``F.linear(self, weight, bias)`` with weights dropped; ``work`` is told its multiplies."""
        source, site = self._read(), self.held.site
        pattern = site.weights(self.held.patterns, reader, weight)
        skipped = site.read_by(self.held.use, reader, weight, source.numel() // weight.shape[1])
        if work is not None and torch.is_grad_enabled():
            work.note(site if skipped else None, None, source.numel() * weight.shape[0])
        y = functional.tile_linear(
            source, weight, bias, pattern, site.scale, site.backend if skipped else "reference"
        )
        site.watch_passes(y)
        return y

    def _read(self) -> Tensor:
        """What is marked, for a layer that drops weights of its own."""
        self.held.check()
        self.place.use()
        return self.held.source

    def masked_weight(self, weight: Tensor, reader: str, why: str) -> Tensor:
        """The weight of a product that is computed densely, for the reason given: dropped weights are zero in it."""
        source = self._read()
        self.held.site.read_by(self.held.use, reader, weight, source.numel() // weight.shape[1], why)
        masked = self.masked(weight, reader)
        self.held.site.watch_passes(masked)
        return masked

    def masked(self, weight: Tensor, reader: str) -> Tensor:
        """The weight of a reader, zero where it is dropped, and scaled."""
        site = self.held.site
        return functional.masked_weight(weight, site.weights(self.held.patterns, reader, weight), site.scale)
