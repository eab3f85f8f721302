"""The linear layer that waits: whether its output is dropped is known only when a site asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approxdrop_lightning import functional
from approxdrop_lightning.layers.compact_tensor import CompactTensor
from approxdrop_lightning.layers.lazy_tensor import (
    POINTWISE,
    RESHAPES,
    LazyTensor,
    as_dense,
    has_tensor,
    reshaped_leading,
)
from approxdrop_lightning.pattern import RowPattern


class ApproxLinear(nn.Linear):
    """``nn.Linear`` that computes only the rows of its weight that the following dropout keeps.

    In training its output is a :class:`PendingLinear`: elementwise functions are put down, and the product is
    formed where the first reader is: by a site for the kept units, by anybody else for all. So what follows is
    found by the data's own way. In evaluation it is ``nn.Linear``.

    Attributes:
        name: Name in the model, for the report.
        backend: Backend of its products.
        defers: Whether outputs wait for a site.
        waited: Whether an output has waited yet.
        feeds_site: Whether a site was reached yet.
    """

    name: str
    backend: str
    defers: bool
    waited: bool
    feeds_site: bool

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(as_dense(x))
        if isinstance(x, LazyTensor) and not (isinstance(x, CompactTensor) and x.is_lazy):
            x = x.dense()
        if self.defers and x.dim() > 0 and x.shape[-1] == self.in_features:
            self.waited = True
            return PendingLinear(self, x)
        return self.product(x)

    def learn(self) -> None:
        """Stop waiting once a step has shown that no site comes; what is wrong about that costs speed only."""
        self.defers = self.feeds_site or not self.waited

    def product(self, x: Tensor) -> Tensor:
        """The dense output."""
        if isinstance(x, CompactTensor):
            return x.linear(self.weight, self.bias, reader=self.name)
        return F.linear(x, self.weight, self.bias)


class PendingLinear(LazyTensor):
    """Output of an :class:`ApproxLinear` that nobody has read yet.

    Args:
        layer: The layer.
        x: Its input, dense or compact.
        shape: Shape that it shows, if it was viewed.
        chain: Elementwise functions put down so far, as ``(function, arguments, keywords)``.
    """

    @staticmethod
    def __new__(cls, layer: ApproxLinear, x: Tensor, shape: Any = None, chain: tuple = ()) -> PendingLinear:
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return LazyTensor.__new__(cls, shape or (*x.shape[:-1], layer.out_features), dtype, x.device)

    def __init__(self, layer: ApproxLinear, x: Tensor, shape: Any = None, chain: tuple = ()) -> None:
        super().__init__()
        self.layer, self.x, self.chain = layer, x, chain
        device = x.device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._versions = (layer.weight._version, layer.bias._version if layer.bias is not None else 0)

    def _context(self) -> contextlib.AbstractContextManager:
        """As it was when the layer was called."""
        layer = self.layer
        if self._versions != (layer.weight._version, layer.bias._version if layer.bias is not None else 0):
            raise RuntimeError(f"{layer.name}: its output is read after its parameters were changed in place")
        device, dtype, enabled = self._autocast
        if (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) == (dtype, enabled):
            return contextlib.nullcontext()
        return torch.autocast(device, dtype, enabled)

    def _compute(self) -> Tensor:
        with self._context():
            y = self.layer.product(self.x).view(self.shape)
            for func, args, kwargs in self.chain:
                y = func(y, *args, **kwargs)
        return y

    def kept_values(self, pattern: RowPattern) -> Tensor:
        """Values of the units that a pattern keeps, packed; the others are not computed."""
        x, rows = self.x, tuple(self.shape[:-1])
        in_pattern = None
        if isinstance(x, CompactTensor):
            x.on_read(self.layer.name)
            one_grouping = not x.pattern.interleave or not pattern.interleave or x.rows == rows
            if one_grouping and functional.lines_up(x.pattern, pattern):
                in_pattern = x.pattern
        with self._context():
            if in_pattern is None and isinstance(x, CompactTensor):
                # Rows fall into other groups than those of the input: take that side's saving, then select.
                dense = self.layer.product(x).view(self.shape)
                values = functional.pack(dense, pattern, self.layer.backend)
            else:
                values = functional.row_linear(
                    x.reshape(*rows, -1) if in_pattern is None else x.values,
                    self.layer.weight,
                    self.layer.bias,
                    in_pattern,
                    pattern,
                    backend=self.layer.backend,
                    leading_shape=rows,
                )
            for func, args, kwargs in self.chain:
                values = func(values, *args, **kwargs)
        return values

    def _apply(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func in POINTWISE and not has_tensor((*args, *kwargs.values())):
            if kwargs.get("inplace"):
                self.chain = (*self.chain, (func, args, {**kwargs, "inplace": False}))
                return self
            return PendingLinear(self.layer, self.x, tuple(self.shape), (*self.chain, (func, args, kwargs)))
        if func in RESHAPES:
            shape = reshaped_leading(func, tuple(self.shape), args, kwargs)
            if shape is not None:
                return PendingLinear(self.layer, self.x, shape, self.chain)
        return NotImplemented
