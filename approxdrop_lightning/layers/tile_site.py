"""Dropout sites of tile patterns: draw one pattern for each weight that reads the output."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning.layers.draws import Draws
from approxdrop_lightning.layers.lazy_tensor import as_dense, is_ordinary
from approxdrop_lightning.layers.site import Site
from approxdrop_lightning.layers.tiled_tensor import Marked, Patterns, TiledTensor
from approxdrop_lightning.layers.use import Use
from approxdrop_lightning.ops.derivative import batch_of_transforms, is_transformed, outside_of_transforms
from approxdrop_lightning.patterns.tile import BernoulliPattern, TilePattern
from approxdrop_lightning.policy import Thresholds


class TileSite(Site):
    """Dropout that acts on the weights of the layers that read it (DropConnect), not on the units they read.

    Each weight has a pattern of its own at each use of the site. What is not read by a linear layer or an LSTM sees
    conventional dropout of the units.

    Args:
        *args: As of :class:`Site`.
        independent: Whether weights are dropped independently of each other (Wan et al., 2013), which skips nothing;
            else by tiles.
        **kwargs: As of :class:`Site`.
    """

    def __init__(self, *args: Any, independent: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.independent = independent
        self._tiles: Draws[Patterns] = Draws(self.name)
        #: Layers that multiply densely with a masked weight, and why.
        self.masked: dict[str, str] = {}

    @property
    def last_patterns(self) -> tuple[TilePattern | BernoulliPattern, ...]:
        """Patterns of the last training forward, in the order in which the site was used and its output read."""
        return tuple(pattern for use in self._tiles.used() for pattern in use.values())

    @property
    def draws(self) -> Draws[Patterns]:
        """What it has drawn in this step."""
        return self._tiles

    @property
    def skips(self) -> list[str]:
        """What is skipped."""
        return ["consumers' tiles"] if self.consumers else []

    @property
    def remarks(self) -> list[str]:
        """What is not."""
        masked = [f"{name} is masked and dense ({why})" for name, why in sorted(self.masked.items())]
        readers = ", ".join(sorted(self.dense_readers))
        return masked + ([f"units are dropped for {readers}"] if readers else [])

    def drop(self, x: Tensor, inplace: bool = False) -> Tensor:
        """``x`` (``[..., n]``), marked for the layers that read it; or stock dropout of it."""
        if not is_ordinary(x):
            return self.drop_conventionally(x, inplace)
        if self.rate == 0 or x.dim() == 0 or x.numel() == 0:
            return F.dropout(as_dense(x), self.rate, True, inplace)
        use = self.use(tuple(x.shape), x.device, x.dtype)
        if use.is_stock:
            return F.dropout(as_dense(x), self.rate, True, inplace)
        if is_transformed():  # which see plain tensors only: units are dropped
            batch, of_the_level = batch_of_transforms()
            shape = (*batch, *x.shape)
            with outside_of_transforms():
                units = self.units(self._drawn(), math.prod(shape[:-1]), shape[-1])
                mask = units.mask(x.device).view(shape).to(x.dtype) / (1 - self.rate)
            return as_dense(x) * of_the_level(mask)
        if self.sampler.keep < self.sampler.dp or self.independent:
            use.seen |= torch.is_grad_enabled()
        else:
            use.unseen = True
        return TiledTensor(Marked(as_dense(x), self, self._drawn(), use))

    @property
    def decides(self) -> bool:
        """Whether it is stock where nothing is skipped: with independent weights nothing ever is."""
        return not self.independent

    def unread(self, use: Use) -> str:
        """Why nothing is skipped at a use."""
        readers = ", ".join(sorted(use.whole))
        return f"no linear layer or LSTM reads it, but {readers}" if readers else "nobody reads it"

    def _against(self, ask: Thresholds, shape: tuple[int, ...]) -> str | None:
        if self.largest is None:
            return None
        return ask.any_product(int(self.largest * math.prod(shape[:-1]) * self.rate), self.beside_lstm, tiles=True)

    def _drawn(self) -> Patterns:
        """Patterns of the next use, which are drawn when weights are known."""
        return self._next(self._tiles, dict, lambda patterns: True)

    def weights(self, patterns: Patterns, reader: str, weight: Tensor) -> TilePattern | BernoulliPattern:
        """The pattern of a reader's weight ``[n_out, n_in]``, drawn when it reads for the first time."""
        n_out, n_in = weight.shape
        if (reader, n_out, n_in) not in patterns:
            draw = self.sampler.bernoulli if self.independent else self.sampler.tiles
            patterns[reader, n_out, n_in] = draw(n_out, n_in)
        return patterns[reader, n_out, n_in]

    def units(self, patterns: Patterns, rows: int, n: int) -> TilePattern | BernoulliPattern:
        """The pattern of ``[rows, n]`` units for those that have no weight."""
        if ("", rows, n) not in patterns:
            patterns["", rows, n] = self.sampler.bernoulli(rows, n)
        return patterns["", rows, n]

    def read_by(self, use: Use, name: str, weight: Tensor, rows: int, dense: str | None = None) -> bool:
        """A layer of that name reads with part of its weight.

        Args:
            use: Which use of the site it reads.
            name: Of the layer.
            weight: ``[n_out, n_in]``.
            rows: Rows of the batch.
            dense: Why the layer multiplies densely, if it does for a reason of its own.

        Returns:
            Whether the dropped weights are skipped; else they are masked.
        """
        if self.independent:
            dense = "pattern='dropconnect'"
        elif dense is None:
            dense = use.ask.tiles(tuple(weight.shape), int(rows * weight.numel() * self.rate))
        if dense is None:
            use.read_kept(name, rows * weight.numel())
        elif use.skips is None:
            self.masked[name] = dense
            if self.decides:
                use.refuse(f"{name}: {dense}")
        return dense is None
