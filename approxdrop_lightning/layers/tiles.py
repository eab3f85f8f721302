"""``nn.Linear`` and ``nn.LSTM`` that drop tiles of their weights when a tile site precedes them."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from approxdrop_lightning.layers.contexts import run_eagerly
from approxdrop_lightning.layers.converted import Converted
from approxdrop_lightning.layers.lazy_tensor import as_dense, is_ordinary
from approxdrop_lightning.layers.lstm import ApproxLSTM
from approxdrop_lightning.layers.tiled_tensor import TiledTensor
from approxdrop_lightning.work import Ledger


def _is_marked(x: Tensor) -> TypeGuard[TiledTensor]:
    return isinstance(x, TiledTensor) and x.is_marked


class TileLinear(Converted, nn.Linear):
    """``nn.Linear`` that drops weights of its own, by tiles, where its input comes from a site.

    In evaluation it is ``nn.Linear``.

    Attributes:
        name: Name in the model, for the report.
        work: Multiplies of its last products.
    """

    stock = nn.Linear
    name: str
    work: Ledger

    @run_eagerly
    def _run(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        x = input  # the name by which nn.Linear may be called
        if isinstance(x, Proxy):
            return self._as_stock(x)
        training = self.drops
        if training and _is_marked(x) and x.shape[-1] == self.in_features:
            return x.linear(self.weight, self.bias, self.name, self.work)
        x = as_dense(x)
        y = self._as_stock(x)
        if training and torch.is_grad_enabled() and is_ordinary(x):
            self.work.note(None, None, x.numel() * self.out_features)
        return y


class TileLSTM(ApproxLSTM):
    """``nn.LSTM`` that drops weights of its inputs, layer by layer, by tiles.

    The input product of all steps is one product with kept tiles, and the recurrence runs over ready-made gate
    inputs; where that would not gain, the vendor's kernel runs with the masked weight. Recurrent weights are not
    dropped.
    """

    stock = nn.LSTM

    def _layer(self, layer: int, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not _is_marked(x):
            return super()._layer(layer, as_dense(x), state)
        weight_ih, weight_hh, *biases = self._weights(layer)
        reader = self._reader(layer)
        self.work.note(None, None, x.shape[0] * x.shape[1] * weight_hh.numel())
        site = x.held.site
        if site.independent:
            dense: str | None = "masking skips nothing"
        elif self._too_small(x.held.use, x.shape[0] * x.shape[1], weight_hh):
            dense = "too small for a recurrence of our own"
        else:
            dense = x.held.use.ask.recurrence(self.hidden_size)
        if dense is None:
            gates = x.linear(weight_ih, biases[0] + biases[1] if biases else None, reader, self.work)

            def dropped(weight: Tensor) -> Tensor:
                return x.masked(weight, reader)

            return self._sequence(gates, state, weight_hh, None, 1.0, x.held.source, [weight_ih, *biases], dropped)
        self.work.note(None, None, x.numel() * len(weight_ih))
        weight_ih = x.masked_weight(weight_ih, reader, dense)
        return self._vendor(x.held.source, state, [weight_ih, weight_hh, *biases])
