"""``nn.LSTM`` that reads only the inputs a dropout keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from approxdrop_lightning import functional
from approxdrop_lightning.layers.compact_tensor import CompactTensor, past
from approxdrop_lightning.layers.contexts import run_eagerly
from approxdrop_lightning.layers.converted import Converted
from approxdrop_lightning.layers.kept import Seen
from approxdrop_lightning.layers.lazy_tensor import LazyTensor, as_dense
from approxdrop_lightning.layers.site import Site
from approxdrop_lightning.layers.use import Use
from approxdrop_lightning.ops.derivative import is_transformed, outside_of_transforms
from approxdrop_lightning.ops.lstm import reference
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.policy import product_dtype
from approxdrop_lightning.work import Ledger

_State = tuple[Tensor, Tensor]


class ApproxLSTM(Converted, nn.LSTM):
    """``nn.LSTM`` with approximate dropout between its layers and on its (compact) input.

    Non-recurrent dropout, as Zaremba et al. (2014) place it, and recurrent dropout if asked for. A layer whose input
    has a shared pattern runs the vendor's kernel on the compact input and the kept columns of ``weight_ih``. With an
    interleaved pattern the input product of all steps is one grouped product, and the recurrence runs over ready-made
    gate inputs; so it does with recurrent dropout. In evaluation it is ``nn.LSTM``, as it is for a
    ``PackedSequence``.

    Attributes:
        name: Name in the model, for the report.
        backend: Backend of its products.
        sites: Dropout on the output of each layer but the last; empty without ``dropout``.
        recurrent_sites: Dropout on the recurrent input of each layer, one pattern for all rows and steps (Gal and
            Ghahramani, 2016); empty without.
        work: Multiplies of its last products.
    """

    stock = nn.LSTM
    name: str
    backend: str
    sites: list[Site]
    recurrent_sites: list[Site]
    work: Ledger

    @staticmethod
    def unsupported(layer: nn.LSTM) -> str | None:
        """Why a stock layer must be left as it is, or None."""
        if layer.bidirectional:
            return "a bidirectional LSTM is not supported"
        if layer.proj_size:
            return "an LSTM with projections (proj_size) is not supported"
        return None

    @run_eagerly
    def _run(self, input: Tensor | PackedSequence, hx: _State | None = None) -> tuple[Any, _State]:
        """As ``nn.LSTM``: ``[T, B, input]`` (``[B, T, input]`` if ``batch_first``, ``[T, input]`` unbatched)."""
        if isinstance(input, Proxy):
            raise RuntimeError(
                f"{self.name}: torch.fx does not trace a converted nn.LSTM in training mode; trace the model in "
                "evaluation mode, or after restore(model)"
            )
        if not self.drops or isinstance(input, PackedSequence):
            return self._stock(input, hx)
        x, given = input, hx  # the name by which nn.LSTM may be called
        if x.dim() not in (2, 3) or x.shape[-1] != self.input_size:
            return self._as_stock(as_dense(x), hx)  # it raises nn.LSTM's own error
        batched = x.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            x = x.unsqueeze(batch_dim)
            hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if hx is None:
            zeros = torch.zeros(self.num_layers, x.shape[batch_dim], self.hidden_size, dtype=x.dtype, device=x.device)
            hx = (zeros, zeros)
        else:
            self.check_forward_args(torch.empty(x.shape, dtype=x.dtype, device="meta"), hx, None)
        if self._is_stock(x):
            return self._conventional(as_dense(input), given)
        states = []
        for layer in range(self.num_layers):
            if layer and self.sites:
                x = self.sites[layer - 1].drop(x)
            x, state = self._layer(layer, x, (hx[0][layer], hx[1][layer]))
            states.append(state)
        h, c = (torch.stack(part) for part in zip(*states, strict=True))
        if not batched:
            x, h, c = x.squeeze(batch_dim), h.squeeze(1), c.squeeze(1)
        return x, (h, c)

    def _stock(self, input: Tensor | PackedSequence, hx: _State | None) -> tuple[Any, _State]:
        """As the stock layer; in training with the rate that was asked for."""
        if not (self.drops and isinstance(input, PackedSequence)):
            return self._as_stock(as_dense(input), hx)
        for site in self.sites:
            site.conventional = f"nn.LSTM runs packed sequences, with conventional dropout of {site.rate:g}"
        for site in self.recurrent_sites:
            site.conventional = "nn.LSTM runs packed sequences, without recurrent dropout"
        if torch.is_grad_enabled():
            weights = sum(p.numel() for p in self._parameters.values() if p is not None and p.dim() == 2)
            self.work.note(None, None, len(input.data) * weights)
        return self._conventional(input, hx)

    def _conventional(self, input: Tensor | PackedSequence, hx: _State | None) -> tuple[Any, _State]:
        """The stock layer with the rate that was asked for."""
        own, self.dropout = self.dropout, self.sites[0].rate if self.sites else self.dropout
        try:
            return self._as_stock(input, hx)
        finally:
            self.dropout = own

    def _is_stock(self, x: Tensor) -> bool:
        """Whether nothing is dropped by a pattern in a call, neither of what is read nor between the layers."""
        if not self.sites or self.recurrent_sites or (isinstance(x, LazyTensor) and x.is_lazy):
            return False
        shape = *x.shape[:-1], self.hidden_size
        uses = [site.use(shape, x.device, x.dtype) for site in self.sites]
        for site, use in zip(self.sites, uses, strict=True):
            if use.skips is None and not use.seen:
                reason = self._against(use, site, x.shape[0] * x.shape[1])
                if reason is not None:
                    use.decide(reason)
        stock = all(use.is_stock for use in uses)
        if stock and torch.is_grad_enabled():
            weights = sum(p.numel() for p in self._parameters.values() if p is not None and p.dim() == 2)
            self.work.note(None, None, x.shape[0] * x.shape[1] * weights)
        return stock

    def _against(self, use: Use, site: Site, rows: int) -> str | None:
        """Why a layer had better read all of what a site between layers drops from, by the vendor's kernel."""
        reason = use.ask.lstm(int(rows * 4 * self.hidden_size**2 * site.rate))
        return use.ask.recurrence(self.hidden_size) if reason is None and site.sampler.interleave else reason

    def _layer(self, layer: int, x: Tensor, state: _State) -> tuple[Tensor, _State]:
        """One layer, reading ``x`` dense, compact with a shared pattern, or compact and interleaved."""
        weight_ih, weight_hh, *biases = self._weights(layer)
        held = x.held if isinstance(x, CompactTensor) and x.is_lazy else None
        dropped = self.recurrent_sites[layer] if self.recurrent_sites else None
        rows = x.shape[0] * x.shape[1]
        if held is not None and self._too_small(held.use, rows, weight_ih):
            x, held = as_dense(x), None
        if held is not None and held.pattern.interleave and dropped is None:
            too_small = held.use.ask.recurrence(self.hidden_size)
            if too_small is not None:
                held.use.read_whole(f"{self.name} ({too_small})")
                x, held = as_dense(x), None
        recurrent = None
        if dropped is not None:
            with outside_of_transforms() if is_transformed() else contextlib.nullcontext():
                recurrent = dropped.pattern(self.hidden_size, shared=True)
        if dropped is not None and recurrent is not None and self._masks(dropped, rows, weight_hh):
            weight_hh = masked_columns(weight_hh, recurrent, dropped.scale)
            dropped = recurrent = None
        multiplies = rows * x.shape[-1] * 4 * self.hidden_size
        for site, share in [(None, multiplies)] if held is None else held.use.shares(multiplies):
            self.work.note(site, None, share)
        self.work.note(dropped, None, rows * self.hidden_size * 4 * self.hidden_size)
        if held is not None:
            held.use.read_kept(self._reader(layer), multiplies)
        if dropped is not None:
            dropped.read_kept(self.name)
        elif held is None:
            return self._vendor(as_dense(x), state, [weight_ih, weight_hh, *biases])
        scale = 1.0 if dropped is None else dropped.scale
        if held is None or held.pattern.interleave or recurrent is not None:
            bias = biases[0] + biases[1] if biases else None
            if held is None:
                x = as_dense(x)
                gates = functional.row_linear(x, weight_ih, bias, backend=self.backend)
            else:
                gates = functional.row_linear(
                    held.values, weight_ih, bias, held.pattern, backend=self.backend, leading_shape=held.rows
                ).view(*held.shape[:-1], -1)
            return self._sequence(gates, state, weight_hh, recurrent, scale, x, (weight_ih, *biases))
        values = held.values.view(*held.shape[:-1], held.pattern.n_kept)
        weights = [weight_ih, weight_hh, *biases]
        y, (h, c) = self._vendor(values, state, weights, held.pattern)

        def of_the_dense(x: Tensor, h0: Tensor, c0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            y, (h, c) = self._vendor(x, (h0, c0), list(weights))
            return y, h, c

        y, h, c = past(of_the_dense, x, (y, h, c), (*state, *weights))
        return y, (h, c)

    def _masks(self, site: Site, rows: int, weight: Tensor) -> bool:
        """Whether recurrent dropout is a mask: of a product too small, and under transforms."""
        ask = site.policy.at(weight.device, product_dtype(weight.device, weight.dtype))
        saved = int(rows * weight.numel() * site.rate)
        return is_transformed() or site.refuse(ask.lstm(saved))

    @staticmethod
    def _too_small(use: Seen, rows: int, weight: Tensor) -> bool:
        """Whether the vendor's kernel had better run the layer."""
        return use.saves_too_few_in_lstm(rows * weight.numel())

    def _weights(self, layer: int) -> tuple[Tensor, ...]:
        """``weight_ih``, ``weight_hh`` and, if there are any, both biases of a layer."""
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self.bias else ()))
        return tuple(getattr(self, f"{name}_l{layer}") for name in names)

    def _reader(self, layer: int) -> str:
        """Name of a layer, for the report."""
        return self.name if layer == 0 else f"{self.name} (layer {layer})"

    def _sequence(
        self,
        gates: Tensor,
        state: _State,
        weight_hh: Tensor,
        pattern: RowPattern | None,
        scale: float,
        x: Tensor,
        weights: Sequence[Tensor],
        ih: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, _State]:
        """The recurrence of a layer over its gate inputs, which it has made of ``x``.

        Args:
            gates: The gate inputs.
            state: Of the layer, before its first step.
            weight_hh: Recurrent weight.
            pattern: Of its inputs, or None.
            scale: Of the kept ones.
            x: Input of the layer.
            weights: ``weight_ih`` and the biases, if there are any.
            ih: What has been dropped of ``weight_ih``.
        """
        steps = gates.transpose(0, 1) if self.batch_first else gates
        y, h, c = functional.lstm_sequence(steps, *state, weight_hh, pattern, scale)

        def masked(
            x: Tensor, h0: Tensor, c0: Tensor, weight_hh: Tensor, weight_ih: Tensor, *biases: Tensor
        ) -> tuple[Tensor, ...]:
            weight_ih = weight_ih if ih is None else ih(weight_ih)
            gates = F.linear(x, weight_ih, biases[0] + biases[1] if biases else None)
            if pattern is not None:
                weight_hh = masked_columns(weight_hh, pattern, scale)
            y, h, c = reference.sequence(
                gates.transpose(0, 1) if self.batch_first else gates, h0, c0, weight_hh, None
            )
            return (y.transpose(0, 1) if self.batch_first else y), h, c

        y = y.transpose(0, 1) if self.batch_first else y
        y, h, c = past(masked, x, (y, h, c), (*state, weight_hh, *weights))
        return y, (h, c)

    def _vendor(
        self, x: Tensor, state: _State, weights: list[Tensor], pattern: RowPattern | None = None
    ) -> tuple[Tensor, _State]:
        """A layer by the kernel of ``nn.LSTM``; ``x`` holds what the pattern keeps."""
        hx = (state[0].unsqueeze(0), state[1].unsqueeze(0))
        y, h, c = torch._VF.lstm(
            x, hx, functional.lstm_weights(pattern, *weights), self.bias, 1, 0.0, True, False, self.batch_first
        )
        return y, (h[0], c[0])


def masked_columns(weight: Tensor, pattern: RowPattern, scale: float) -> Tensor:
    """A weight with the columns that a shared pattern drops zeroed, and the others scaled."""
    return weight * pattern.mask(1, dtype=weight.dtype, value=scale, device=weight.device)
