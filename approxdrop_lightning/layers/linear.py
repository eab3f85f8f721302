"""The linear layer that waits: whether its output is dropped is known only when a site asks for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approxdrop_lightning import functional
from approxdrop_lightning.layers.compact_tensor import CompactTensor, Kept
from approxdrop_lightning.layers.lazy_tensor import (
    POINTWISE,
    RESHAPES,
    LazyTensor,
    as_dense,
    has_tensor,
    reshaped_leading,
    run_eagerly,
)
from approxdrop_lightning.pattern import RowPattern

#: (site before, site after) -> multiplies of the dense product.
Work = dict[tuple[Any, Any], int]


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
        work: Dense multiplies of its last products, by the sites before and after it.
    """

    name: str
    backend: str
    defers: bool
    waited: bool
    feeds_site: bool
    work: Work

    @run_eagerly
    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(as_dense(x))
        if isinstance(x, LazyTensor) and not (isinstance(x, CompactTensor) and x.is_lazy):
            x = x.dense()
        if self.defers and x.dim() > 0 and x.shape[-1] == self.in_features:
            self.waited = True
            return PendingLinear(Pending(self, x, (*x.shape[:-1], self.out_features)))
        return self.product(x, self.weight, self.bias)

    def record(self, x: Tensor, after: Any) -> None:
        """Note a product: of ``x``, between the site that made it, if any, and the site ``after`` it, if any."""
        before = x.held.site if isinstance(x, CompactTensor) and x.is_lazy else None
        self.work[before, after] = math.prod(x.shape) * self.out_features

    def learn(self) -> None:
        """Stop waiting once a step has shown that no site comes; what is wrong about that costs speed only."""
        self.defers = self.feeds_site or not self.waited

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The dense output."""
        self.record(x, None)
        if isinstance(x, CompactTensor):
            return x.linear(weight, bias, reader=self.name)
        return F.linear(x, weight, bias)


class Pending:
    """What a :class:`PendingLinear` holds.

    Args:
        layer: The layer.
        x: Its input, dense or compact.
        shape: Shape that is shown; the layer's output may have been viewed.
        chain: Elementwise functions put down so far, as ``(function, arguments, keywords)``.
    """

    def __init__(self, layer: ApproxLinear, x: Tensor, shape: tuple[int, ...], chain: tuple = ()) -> None:
        self.layer, self.x, self.shape, self.chain = layer, x, shape, chain
        # Those of the call: torch.func.functional_call, for one, puts others in their place for its duration.
        self.weight, self.bias = layer.weight, layer.bias
        self.device = x.device
        kind = x.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.dtype = self._autocast[1] if self._autocast[2] else x.dtype
        self._versions = self._input_versions()

    def _input_versions(self) -> list[int]:
        return [t._version for t in self.inputs() if t is not None]

    def inputs(self) -> tuple[Tensor | None, ...]:
        x = self.x.held.values if isinstance(self.x, CompactTensor) else self.x
        return x, self.weight, self.bias

    def compute(self) -> Tensor:
        with self._context():
            return self._finish(self._dense_product())

    def _dense_product(self) -> Tensor:
        return self.layer.product(self.x, self.weight, self.bias).view(self.shape)

    def _context(self) -> contextlib.AbstractContextManager:
        """As it was when the layer was called."""
        if self._versions != self._input_versions():
            raise RuntimeError(
                f"{self.layer.name}: its output is read for the first time after its input or parameters were "
                "changed in place; read it before that"
            )
        kind, dtype, enabled = self._autocast
        if (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) == (dtype, enabled):
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype, enabled)

    def _finish(self, y: Tensor) -> Tensor:
        for func, args, kwargs in self.chain:
            y = func(y, *args, **kwargs)
        return y

    def kept_values(self, pattern: RowPattern, site: Any) -> Tensor:
        """Values of the units that a site's pattern keeps, packed; the others are not computed."""
        layer, rows = self.layer, self.shape[:-1]
        compact = self.x.held if isinstance(self.x, CompactTensor) else None
        with self._context():
            if compact is None:
                layer.record(self.x, site)
                values = functional.row_linear(
                    self.x.reshape(*rows, layer.in_features),
                    self.weight, self.bias, None, pattern, backend=layer.backend,
                )  # fmt: skip
            elif self._one_grouping(compact, pattern):
                layer.record(self.x, site)
                compact.site.read_kept(layer.name)
                values = functional.row_linear(
                    compact.values, self.weight, self.bias, compact.pattern, pattern, backend=layer.backend,
                    leading_shape=rows,
                )  # fmt: skip
            else:
                # Rows fall into other groups than those of the input: take that side's saving, then select.
                values = functional.pack(self._dense_product(), pattern, layer.backend)
            return self._finish(values)

    def _one_grouping(self, compact: Kept, pattern: RowPattern) -> bool:
        """Whether one product can serve the patterns of input and output."""
        if compact.pattern.interleave and compact.rows != self.shape[:-1]:
            return False
        return functional.lines_up(compact.pattern, pattern)


class PendingLinear(LazyTensor):
    """Output of an :class:`ApproxLinear` that nobody has read yet."""

    held: Pending

    def _apply(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        held = self.held
        if func in POINTWISE and not has_tensor((*args, *kwargs.values())):
            if kwargs.get("inplace"):
                held.chain = (*held.chain, (func, args, {**kwargs, "inplace": False}))
                return self
            return PendingLinear(Pending(held.layer, held.x, held.shape, (*held.chain, (func, args, kwargs))))
        if func in RESHAPES:
            shape = reshaped_leading(func, held.shape, args, kwargs)
            if shape is not None:
                return PendingLinear(Pending(held.layer, held.x, shape, held.chain))
        return NotImplemented
