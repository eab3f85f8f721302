"""``nn.Linear`` that defers its product until it is known who reads the output, and one that does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from approxdrop_lightning.layers.compact_tensor import CompactTensor
from approxdrop_lightning.layers.contexts import run_eagerly
from approxdrop_lightning.layers.converted import Converted
from approxdrop_lightning.layers.lazy_tensor import LazyTensor, as_dense, is_ordinary, shape_of
from approxdrop_lightning.layers.pending import Pending, PendingLinear
from approxdrop_lightning.layers.stacked import StackedTensor
from approxdrop_lightning.layers.waiting import watch_gradient
from approxdrop_lightning.ops.derivative import is_transformed
from approxdrop_lightning.work import Ledger


class ApproxLinear(Converted, nn.Linear):
    """``nn.Linear`` that computes only the rows of its weight that the following dropout keeps.

    In training its output is a :class:`.PendingLinear`: elementwise functions are recorded, and the first reader
    triggers the product: a site that of the kept units, any other reader that of all. The dropout that follows is
    thus found by following the data. In evaluation it is ``nn.Linear``.

    Attributes:
        name: Name in the model, for the report.
        backend: Backend of its products.
        defers: Whether outputs wait for a site.
        watched: Whether the readers of its outputs are being recorded.
        read_whole_too: Whether an output was read whole after a site had its kept units computed.
        read_whole_by: Name of the function that has last read an output whole.
        work: Multiplies of its last products.
    """

    stock = nn.Linear
    name: str
    backend: str
    defers: bool
    watched: bool
    read_whole_too: bool
    read_whole_by: str | None
    work: Ledger

    def _captured(self, input: Tensor) -> Tensor:
        return self._as_stock(input)  # the pass over the graph makes of it what is to be made

    @run_eagerly
    def _run(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        x = input  # the name by which nn.Linear may be called
        if not (torch.is_grad_enabled() and self.drops) or is_transformed() or isinstance(x, Proxy):
            return self._as_stock(as_dense(x))
        if not is_ordinary(x):
            return self._as_stock(x)
        shape = shape_of(x)
        if shape[-1:] != (self.in_features,):
            return self._as_stock(as_dense(x))  # it raises nn.Linear's own error
        multiplies = math.prod(shape) * self.out_features
        if isinstance(x, StackedTensor) and x.serves(multiplies):
            return x.of_each(self._run)
        if isinstance(x, LazyTensor) and not (isinstance(x, CompactTensor) and x.serves(multiplies)):
            x = x.dense()
        weight, bias = self.weight, self.bias
        watch_gradient(weight if weight.requires_grad else bias)
        if not self.defers:
            if isinstance(x, CompactTensor):
                for site, share in x.held.use.shares(multiplies):
                    self.work.note(site, None, share)
                return x.linear(weight, bias, self.name)
            self.work.note(None, None, multiplies)
            return self._as_stock(x)
        return PendingLinear(Pending(self, x, (*shape[:-1], self.out_features), weight, bias))


class CapturedLinear(Converted, nn.Linear):
    """``nn.Linear`` in a model whose only dropouts are function calls, which skip in compiled graphs alone.

    It computes as ``nn.Linear``. Dynamo guards on classes, so this one keeps apart the graphs of the stock model,
    whose code is the same.

    Attributes:
        name: Name in the model.
    """

    stock = nn.Linear
    name: str
    forward = nn.Linear.forward
