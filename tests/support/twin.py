"""The conventional twin of a converted model, with the same masks: what the converted model must equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approxdrop_lightning import RowPattern
from approxdrop_lightning.patterns.tile import BernoulliPattern


class Masks:
    """Replays the patterns of a converted model's sites as masks, in order of use."""

    def __init__(self, report) -> None:
        self.report = report
        self.read()

    def read(self) -> None:
        """Begin again, with the patterns of the converted model's last step."""
        sites = {row.name: row.site for row in self.report if row.site}
        self._uses: dict[str, list] = {name: list(site.last_patterns) for name, site in sites.items()}
        self._scale = {name: site.scale for name, site in sites.items()}

    def has(self, name: str) -> bool:
        return name in self._uses

    def __call__(self, name: str, x: Tensor) -> Tensor:
        pattern = self._uses[name][0]
        if isinstance(pattern, RowPattern):
            return x * (self._uses[name].pop(0).mask(*x.shape[:-1]).to(x) * self._scale[name])
        of_units = (pattern.n_out, pattern.n_in) == (x.shape[:-1].numel(), x.shape[-1])
        if of_units and isinstance(pattern, BernoulliPattern):  # no weight dropped by DropConnect has this shape
            return x * (self._uses[name].pop(0).mask().view(x.shape).to(x) / (1 - pattern.rate))
        return MarkedInput.of(x, self, name)

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """A weight with the next pattern of a site applied."""
        return weight * (self._uses[name].pop(0).mask().to(weight) * self._scale[name])


class MarkedInput(Tensor):
    """Input of a layer that drops weights of its own."""

    @staticmethod
    def of(x: Tensor, masks: Masks, name: str) -> Tensor:
        marked = x.as_subclass(MarkedInput)
        marked.masks, marked.site = masks, name
        return marked

    @property
    def plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs, x = kwargs or {}, args[0]
        if func is F.linear:
            return F.linear(x.plain, x.masks.weight(x.site, args[1]), *args[2:], **kwargs)
        if func.__name__ in ("view", "reshape", "flatten", "unsqueeze", "squeeze"):
            return MarkedInput.of(func(x.plain, *args[1:], **kwargs), x.masks, x.site)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class MaskedDropout(nn.Module):
    """In nn.Dropout's place in the twin."""

    def __init__(self, masks: Masks, name: str) -> None:
        super().__init__()
        self.masks, self.name = masks, name

    def forward(self, x: Tensor) -> Tensor:
        return self.masks(self.name, x)


class MaskedLSTM(nn.Module):
    """In nn.LSTM's place in the twin: stock layers one after the other, masked in between."""

    def __init__(self, masks: Masks, name: str, lstm: nn.LSTM) -> None:
        super().__init__()
        self.masks, self.name, self.lstm = masks, name, lstm

    def forward(self, x: Tensor, hx=None):
        lstm, states = self.lstm, []
        if hx is None:
            shape = (lstm.num_layers, x.shape[0 if lstm.batch_first else 1], lstm.hidden_size)
            hx = (x.new_zeros(shape), x.new_zeros(shape)) if x.dim() == 3 else (x.new_zeros(shape[0], shape[2]),) * 2
        batched = x.dim() == 3
        if not batched:
            dim = 0 if lstm.batch_first else 1
            x, hx = x.unsqueeze(dim), tuple(h.unsqueeze(1) for h in hx)
        for layer in range(lstm.num_layers):
            if layer and lstm.dropout:
                x = self.masks(f"{self.name} (after layer {layer - 1})", x)
            names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if lstm.bias else [])]
            weights = [getattr(lstm, f"{name}_l{layer}") for name in names]
            state = tuple(h[layer : layer + 1].contiguous() for h in hx)
            if self.masks.has(recurrent := f"{self.name} (recurrent, layer {layer})"):
                # Masking the recurrent input of every step alike is masking the columns of its weight.
                weights[1] = self.masks(recurrent, weights[1])
            if isinstance(x, MarkedInput):
                weights[0], x = x.masks.weight(x.site, weights[0]), x.plain
            x, h, c = torch._VF.lstm(x, state, weights, lstm.bias, 1, 0.0, False, False, lstm.batch_first)
            states.append((h[0], c[0]))
        h, c = (torch.stack(part) for part in zip(*states, strict=True))
        return (x, (h, c)) if batched else (x.squeeze(dim), (h.squeeze(1), c.squeeze(1)))


def twin(model: nn.Module, report, masks: Masks | None = None) -> nn.Module:
    """Put masks in the place of the dropout of an unconverted copy: those of the last step, or given ones."""
    masks = Masks(report) if masks is None else masks
    names = {row.name for row in report if row.site}
    for name, module in list(model.named_modules()):
        if name in names and isinstance(module, nn.Dropout):
            _replace(model, name, MaskedDropout(masks, name))
        elif isinstance(module, nn.LSTM):
            _replace(model, name, MaskedLSTM(masks, name, module))
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
