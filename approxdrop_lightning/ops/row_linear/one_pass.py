"""Linear layer that reads the weight once for all groups of rows, regardless of their orders of the units.

With several orders, an input is kept by several groups, and in :mod:`.groups` each group reads its own submatrix of
the weight. If every group keeps whole blocks whose size is a multiple of 16 inputs, compiled code (``one_pass.c``)
packs each panel of the weight once and multiplies it by every group that keeps it. Layers that drop outputs do not
benefit: :mod:`.groups` is equally fast for them.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate

import torch
from torch import Tensor

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.product import native_for
from approxdrop_lightning.ops.row_linear.groups import GroupedLinear
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.units import Units

#: Number of consecutive inputs that compiled code packs together (``PANEL`` in ``one_pass.c``).
PANEL = 16
#: Multiplies below which a second thread costs more than it saves.
_SMALL = 100_000


class LayerStruct(ctypes.Structure):
    """``Layer`` of ``one_pass.c``."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("row", ctypes.c_void_p),
        ("first_row", ctypes.c_void_p),
        ("panel", ctypes.c_void_p),
        ("first_panel", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("w_output", ctypes.c_int64),
        ("w_input", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    ]


def linear_between(
    in_pattern: RowPattern | None,
    out_pattern: RowPattern | None,
    leading_shape: tuple[int, ...],
    weight: Tensor,
) -> GroupedLinear:
    """The layer between two patterns, either of which may be None; one-pass if possible."""
    if in_pattern is not None and out_pattern is None and OnePassLinear.fits(in_pattern):
        return OnePassLinear(in_pattern, leading_shape, weight)
    return GroupedLinear(in_pattern, out_pattern, leading_shape, weight)


class OnePassLinear(GroupedLinear):
    """A :class:`.GroupedLinear` that computes all outputs, and whose groups keep whole panels of the inputs."""

    @staticmethod
    def fits(pattern: RowPattern) -> bool:
        """Whether the groups of an input pattern keep whole panels."""
        return pattern.n_groups > 1 and pattern.block_size % PANEL == 0

    def __init__(self, pattern: RowPattern, leading_shape: tuple[int, ...], weight: Tensor) -> None:
        super().__init__(pattern, None, leading_shape, weight)
        self._pattern, self._leading_shape = pattern, leading_shape
        kept = sum(r.count * u.count for r, u in zip(self.inputs.rows, self.inputs.units, strict=True))
        self._threads = 1 if kept * self.outputs.n < _SMALL else torch.get_num_threads()
        self._panels: tuple[Tensor, Tensor] | None = None

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self.outputs.new(x)
        return y if self.run("one_pass_product", x, y, weight, bias) else super().product(x, weight, bias)

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        dx = self.inputs.new(dy)
        return dx if self.run("one_pass_input_grad", dx, dy, weight) else super().input_grad(dy, weight)

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        grad = buffer((self.outputs.n, self.inputs.n), dy, exact=True)
        return grad if self.run("one_pass_weight_grad", x, dy, grad) else super().weight_grad(dy, x)

    def run(self, name: str, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        """Call a compiled function if it supports these tensors.

        Args:
            name: Name of the function, which writes to ``y``, ``x`` or ``weight``.
            x: Packed inputs, or their gradient.
            y: Outputs ``[rows, n_out]``, or their gradient.
            weight: Weight ``[n_out, n_in]``, or its gradient.
            bias: ``[n_out]`` or None.

        Returns:
            Whether the function was called.
        """
        x, y = x.contiguous(), y.reshape(-1, self.outputs.n).contiguous()
        bias = None if bias is None else bias.contiguous()
        native = native_for([x, y, weight] if bias is None else [x, y, weight, bias])
        if native is None or not (x.numel() and y.numel()):
            return False
        if self._panels is None:
            self._panels = _kept_panels(self._pattern)
        panel, first_panel = self._panels
        row = self._pattern.row_order(self._leading_shape)
        first_row = _starts([rows.count for rows in self.inputs.rows])
        layer = LayerStruct(
            rows=len(row),
            inputs=self.inputs.n,
            outputs=self.outputs.n,
            groups=self._pattern.n_groups,
            row=row.data_ptr(),
            first_row=first_row.data_ptr(),
            panel=panel.data_ptr(),
            first_panel=first_panel.data_ptr(),
            x=x.data_ptr(),
            y=y.data_ptr(),
            weight=weight.data_ptr(),
            w_output=weight.stride(0),
            w_input=weight.stride(1),
            bias=None if bias is None else bias.data_ptr(),
        )
        getattr(native, name)(ctypes.byref(layer), self._threads)
        return True


def _starts(counts: list[int]) -> Tensor:
    """Start of each of several consecutive groups, and the end of the last one."""
    return torch.tensor([0, *accumulate(counts)], device="cpu")


def _kept_panels(pattern: RowPattern) -> tuple[Tensor, Tensor]:
    """Panels of all groups, group after group, and the start of each group's."""
    kept = [_panels(pattern.units(group), pattern) for group in range(pattern.n_groups)]
    return torch.cat(kept), _starts([len(panels) for panels in kept])


def _panels(units: Units, pattern: RowPattern) -> Tensor:
    first, per_block = units.starts // PANEL, pattern.block_size // PANEL
    if per_block == 1:
        return first
    panels = (first[:, None] + torch.arange(per_block, device="cpu")).view(-1)
    return panels[panels * PANEL < pattern.n]  # the last block may be shorter
