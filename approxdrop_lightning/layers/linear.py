"""The linear layer that waits: whether its output is dropped is known only when a site asks for it."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approxdrop_lightning import functional
from approxdrop_lightning.layers.compact_tensor import CompactTensor, Kept
from approxdrop_lightning.layers.converted import Converted
from approxdrop_lightning.layers.lazy_tensor import (
    POINTWISE,
    RESHAPES,
    LazyTensor,
    as_dense,
    has_tensor,
    reshaped_leading,
    run_eagerly,
    saving_as_where,
    saving_hooks,
    shape_of,
)
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.work import Ledger


class ApproxLinear(Converted, nn.Linear):
    """``nn.Linear`` that computes only the rows of its weight that the following dropout keeps.

    In training its output is a :class:`PendingLinear`: elementwise functions are put down, and the product is
    formed where the first reader is: by a site for the kept units, by anybody else for all. So what follows is
    found by the data's own way. In evaluation it is ``nn.Linear``.

    Attributes:
        name: Name in the model, for the report.
        backend: Backend of its products.
        defers: Whether outputs wait for a site.
        waited: Whether an output has waited yet.
        dropped_by: Sites reached so far.
        read_whole_too: Whether an output was read whole after a site had its kept units computed.
        work: Multiplies of its last products.
    """

    stock = nn.Linear
    name: str
    backend: str
    defers: bool
    waited: bool
    dropped_by: set[Any]
    read_whole_too: bool
    work: Ledger

    @run_eagerly
    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        x = input  # the name by which nn.Linear may be called
        if not (self.training and torch.is_grad_enabled() and self.is_live):
            return super().forward(as_dense(x))
        shape = shape_of(x)
        if shape[-1:] != (self.in_features,):
            return super().forward(as_dense(x))  # it raises nn.Linear's own error
        multiplies = math.prod(shape) * self.out_features
        if isinstance(x, LazyTensor) and not (isinstance(x, CompactTensor) and x.serves(multiplies)):
            x = x.dense()
        waits = self.defers and not self._too_small(multiplies, x)
        if not waits and not isinstance(x, LazyTensor):
            self.work.note(None, None, multiplies)
            return super().forward(x)
        pending = Pending(self, x, (*shape[:-1], self.out_features))
        if not waits:
            return pending.compute()
        self.waited = True
        return PendingLinear(pending)

    def _too_small(self, multiplies: int, x: Tensor) -> bool:
        """Whether none of the sites reached so far skips anything of so small a product: it need not wait."""
        source = x.held if isinstance(x, LazyTensor) else x  # past the detour of a lazy tensor's attributes
        kind = source.device, source.dtype
        return bool(self.dropped_by) and all(site.saves_too_few(multiplies, *kind) for site in self.dropped_by)

    def learn(self) -> None:
        """Stop waiting once a step has shown that no site comes; what is wrong about that costs speed only."""
        if self.read_whole_too:
            self.defers = False
            for site in self.dropped_by:
                site.producers.discard(self.name)
            for before, after in [sites for sites in self.work if sites[1] is not None]:
                del self.work[before, after]
        elif self.waited and not self.dropped_by:
            self.defers = False


class Pending:
    """What a :class:`PendingLinear` holds.

    Args:
        layer: The layer.
        x: Its input, dense or compact.
        shape: Shape of its output.
    """

    def __init__(self, layer: ApproxLinear, x: Tensor, shape: tuple[int, ...]) -> None:
        self.layer, self.x, self.shape = layer, x, shape
        #: Elementwise functions put down so far, as ``(function, arguments, keywords)``.
        self.chain: tuple[Any, ...] = ()
        #: Sites that had kept units of this very output computed; common to all that is derived from it.
        self.readers: list[Any] = []
        self.name, self.backend, self._work = layer.name, layer.backend, layer.work
        # Those of the call: torch.func.functional_call, for one, puts others in their place for its duration.
        self.weight, self.bias = layer.weight, layer.bias
        source = x.held if isinstance(x, LazyTensor) else x  # past the detour of a lazy tensor's attributes
        self.device = source.device
        kind = self.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.dtype = self._autocast[1] if self._autocast[2] else source.dtype
        self._hooks = saving_hooks()
        self._versions = self._input_versions()

    def _input_versions(self) -> list[int]:
        return [t._version for t in self.inputs() if t is not None]

    def inputs(self) -> tuple[Tensor | None, ...]:
        x = self.x.held.values if isinstance(self.x, CompactTensor) else self.x
        return x, self.weight, self.bias

    def derived(self, **changed: Any) -> Pending:
        """The same product, in another shape or with another chain."""
        other = copy.copy(self)
        vars(other).update(changed)
        return other

    def followed_by(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pending | None:
        """With one more function at the end of the chain; None if it is called in another autocast than the layer."""
        kind = self.device.type
        if self._autocast != (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)):
            return None
        dtype = self.dtype
        if self._autocast[2]:  # which takes some functions to float32
            dtype = func(torch.empty(0, dtype=dtype, device=self.device), *args, **kwargs).dtype
        return self.derived(chain=(*self.chain, (func, args, kwargs)), dtype=dtype)

    def compute(self) -> Tensor:
        with self._context():
            return self._finish(self._dense_product())

    def _dense_product(self) -> Tensor:
        self._note(after=None)
        if isinstance(self.x, CompactTensor):
            y = self.x.linear(self.weight, self.bias, reader=self.name)
        else:
            y = F.linear(self.x, self.weight, self.bias)
        return y.view(self.shape)

    @property
    def multiplies(self) -> int:
        """Of the dense product."""
        return math.prod(shape_of(self.x)) * self.weight.shape[0]

    def _note(self, after: Any) -> None:
        """Note the product: between the site that made ``x``, if any, and the site ``after`` it, if any."""
        before = self.x.held.site if isinstance(self.x, CompactTensor) and self.x.is_lazy else None
        self._work.note(before, after, self.multiplies)

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """As it was when the layer was called."""
        if self._versions != self._input_versions():
            raise RuntimeError(
                f"{self.name}: its output is read for the first time after its input or parameters were "
                "changed in place; read it before that"
            )
        kind, dtype, enabled = self._autocast
        same = (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) == (dtype, enabled)
        with saving_as_where(self._hooks), contextlib.nullcontext() if same else torch.autocast(kind, dtype, enabled):
            yield

    def _finish(self, y: Tensor) -> Tensor:
        for func, args, kwargs in self.chain:
            y = func(y, *args, **kwargs)
        return y

    def kept_values(self, pattern: RowPattern, site: Any) -> Tensor:
        """Values of the units that a site's pattern keeps, packed; the others are not computed."""
        rows = self.shape[:-1]
        self.readers.append(site)
        compact = self.x.held if isinstance(self.x, CompactTensor) else None
        with self._context():
            if compact is None:
                self._note(site)
                values = functional.row_linear(
                    self.x.reshape(*rows, self.x.shape[-1]),
                    self.weight, self.bias, None, pattern, backend=self.backend,
                )  # fmt: skip
            elif self._one_grouping(compact, pattern):
                self._note(site)
                compact.site.read_kept(self.name)
                values = functional.row_linear(
                    compact.values, self.weight, self.bias, compact.pattern, pattern, backend=self.backend,
                    leading_shape=rows,
                )  # fmt: skip
            else:
                # Rows fall into other groups than those of the input: take that side's saving, then select.
                values = functional.pack(self._dense_product(), pattern, self.backend)
            return self._finish(values)

    def _one_grouping(self, compact: Kept, pattern: RowPattern) -> bool:
        """Whether one product can serve the patterns of input and output."""
        if compact.pattern.interleave and compact.rows != self.shape[:-1]:
            return False
        return functional.lines_up(compact.pattern, pattern)


class PendingLinear(LazyTensor):
    """Output of an :class:`ApproxLinear` that nobody has read yet."""

    held: Pending

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        held = self.held
        if func in POINTWISE and not has_tensor((*args, *kwargs.values())):
            in_place = kwargs.get("inplace", False)
            if in_place and self._storage.shared:
                return NotImplemented
            longer = held.followed_by(func, args, {**kwargs, "inplace": False} if in_place else kwargs)
            if longer is None or (in_place and longer.dtype != held.dtype):
                return NotImplemented
            if in_place:
                held.chain = longer.chain
                return self
            return PendingLinear(longer)
        if func in RESHAPES:
            shape = reshaped_leading(func, held.shape, args, kwargs)
            if shape is not None:
                return PendingLinear(held.derived(shape=shape), view_of=self)
        return NotImplemented

    def _read_by(self, name: str) -> None:
        if self.is_lazy and self.held.readers and torch.is_grad_enabled():  # not for a metric that looks now and then
            self.held.layer.read_whole_too = True
