"""Products of a layer that reads kept inputs only, where every group keeps whole strips of them.

Groups of several orders keep the same inputs again, and by :mod:`.groups` each of them reads its part of the weight
anew. Here compiled code reads the weight once for all groups (``strips.c``). Layers that drop outputs gain nothing
from it: there the products of :mod:`.groups` are as fast.
"""

from __future__ import annotations

from array import array
from itertools import accumulate

import torch
from torch import Tensor

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.product import native_for
from approxdrop_lightning.ops.row_linear.groups import Groups
from approxdrop_lightning.patterns.row import STRIP, RowPattern
from approxdrop_lightning.patterns.units import Units

#: Multiplies below which a second thread costs more than it saves.
_SMALL = 100_000


def layer_products(
    in_pattern: RowPattern | None,
    out_pattern: RowPattern | None,
    leading_shape: tuple[int, ...],
    weight: Tensor,
) -> Groups:
    """What forms the products of a layer between two patterns, either of which may be None."""
    if in_pattern is not None and out_pattern is None and Strips.fit(in_pattern):
        return Strips(in_pattern, leading_shape, weight)
    return Groups(in_pattern, out_pattern, leading_shape, weight)


class Strips(Groups):
    """Groups of rows that read whole strips of the inputs."""

    @staticmethod
    def fit(pattern: RowPattern) -> bool:
        """Whether the groups of a pattern keep whole strips."""
        return pattern.n_groups > 1 and pattern.block_size % STRIP == 0

    def __init__(self, pattern: RowPattern, leading_shape: tuple[int, ...], weight: Tensor) -> None:
        super().__init__(pattern, None, leading_shape, weight)
        self._pattern, self._leading_shape = pattern, leading_shape
        kept = sum(r.count * u.count for r, u in zip(self.inside.rows, self.inside.units, strict=True))
        self._threads = 1 if kept * self.outside.n < _SMALL else torch.get_num_threads()
        self._strips: tuple[Tensor, array[int]] | None = None

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As that of :class:`.Groups`; so are the next two."""
        y = self.outside.new(x)
        return y if self.run("strips_product", x, y, weight, bias) else super().product(x, weight, bias)

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        dx = self.inside.new(dy)
        return dx if self.run("strips_input_grad", dx, dy, weight) else super().input_grad(dy, weight)

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        grad = buffer((self.outside.n, self.inside.n), dy, exact=True)
        return grad if self.run("strips_weight_grad", x, dy, grad) else super().weight_grad(dy, x)

    def run(self, name: str, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        """Let a compiled function do it; returns whether there is one for these tensors."""
        x, y = x.contiguous(), y.reshape(-1, self.outside.n).contiguous()
        bias = None if bias is None else bias.contiguous()
        native = native_for([x, y, weight] if bias is None else [x, y, weight, bias])
        if native is None or not (x.numel() and y.numel()):
            return False
        if self._strips is None:
            self._strips = _kept_strips(self._pattern)
        strip, first_strip = self._strips
        row = self._pattern.row_order(self._leading_shape)
        first_row = array("q", accumulate((rows.count for rows in self.inside.rows), initial=0))
        layer = array(
            "q",
            (
                len(row), self.inside.n, self.outside.n, self._pattern.n_groups,
                row.data_ptr(), first_row.buffer_info()[0], strip.data_ptr(), first_strip.buffer_info()[0],
                x.data_ptr(), y.data_ptr(), weight.data_ptr(), *weight.stride(),
                0 if bias is None else bias.data_ptr(),
            ),
        )  # fmt: skip
        getattr(native, name)(layer.buffer_info()[0], self._threads)
        return True


def _kept_strips(pattern: RowPattern) -> tuple[Tensor, array[int]]:
    """Strips of each group, group after group, and where those of each begin."""
    parts = [_strips(pattern.units(group), pattern) for group in range(pattern.n_groups)]
    return torch.cat(parts), array("q", accumulate(map(len, parts), initial=0))


def _strips(units: Units, pattern: RowPattern) -> Tensor:
    first, per_block = units.starts // STRIP, pattern.block_size // STRIP
    if per_block == 1:
        return first
    strips = (first[:, None] + torch.arange(per_block, device="cpu")).view(-1)
    return strips[strips * STRIP < pattern.n]  # the last block may be shorter
