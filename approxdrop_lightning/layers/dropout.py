"""``nn.Dropout`` that drops by the patterns of a site."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from approxdrop_lightning.graph import limit
from approxdrop_lightning.graph.frames import never_alone
from approxdrop_lightning.layers.compact_tensor import CompactTensor
from approxdrop_lightning.layers.contexts import run_eagerly
from approxdrop_lightning.layers.converted import Converted
from approxdrop_lightning.layers.lazy_tensor import as_dense
from approxdrop_lightning.layers.site import Pattern, Site


class ApproxDropoutSite(Converted, nn.Dropout):
    """Stands in ``nn.Dropout``'s place; in evaluation it is ``nn.Dropout``.

    Attributes:
        site: The site.
    """

    stock = nn.Dropout
    site: Site
    #: What compiled graphs read of it (:mod:`approxdrop_lightning.graph`); no key: it runs eagerly.
    graph_key: str | None = None
    graph_table: Tensor
    graph_dp: int
    graph_keep: int

    @property
    def last_patterns(self) -> tuple[Pattern, ...]:
        """Patterns of the last training forward, in order of use."""
        return self.site.last_patterns

    @property
    def scale(self) -> float:
        """Factor of the kept values in this step."""
        return self.site.scale

    def _captured(self, input: Tensor) -> Tensor:
        if self.graph_key is None:
            return self._run(input)
        # Key and pair are constants to Dynamo, so that each pair has a graph of its own. A layer that evaluates is of
        # the stock class, so `training` need not be read: it is a property, which PyTorch 2.11 cannot trace.
        return torch.ops.approxdrop.drop(input, self.graph_table, self.graph_key, self.graph_dp, self.graph_keep)

    @never_alone
    def _run(self, input: Tensor) -> Tensor:
        """``[..., n]`` to ``[..., n]``."""
        if self.graph_key is not None and limit.is_reached() and self.drops:
            limit.warn(self.site)
        return self._drop(input)

    @run_eagerly
    def _drop(self, input: Tensor) -> Tensor:
        if not (self.training and self.drops) or isinstance(input, Proxy):
            return self._as_stock(input)
        dropped = self.site.drop(input, self.inplace)
        if isinstance(dropped, CompactTensor) and not torch.is_grad_enabled():
            # Training mode without gradients: nothing waits, so the product exists already.
            return as_dense(dropped)
        return dropped
