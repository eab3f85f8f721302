"""Linear layer that reads the weight once for all groups of rows, regardless of their orders of the units.

With several orders, a unit is kept by several groups, and in :mod:`.groups` each group reads its own submatrix of
the weight, and adds to the gradient of it. If every group keeps whole blocks whose size is a multiple of 16 units,
compiled code (``one_pass.c``) packs each panel of the weight once and multiplies it by every group that keeps it, and
stores each entry of the gradient once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.copies import is_large
from approxdrop_lightning.ops.native.product import native_for
from approxdrop_lightning.ops.row_linear.groups import Gradients, GroupedLinear, GroupedUnits, activate
from approxdrop_lightning.patterns.row import RowPattern, row_counts
from approxdrop_lightning.patterns.units import Units

#: Number of consecutive inputs that compiled code packs together (``PANEL`` in ``one_pass.c``).
PANEL = 16
#: Multiplies below which a second thread costs more than it saves.
_SMALL = 100_000


class OperandStruct(ctypes.Structure):
    """``Operand`` of ``one_pass.c``."""

    _fields_ = [
        ("units", ctypes.c_int64),
        ("panel", ctypes.c_void_p),
        ("first_panel", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class LayerStruct(ctypes.Structure):
    """``Layer`` of ``one_pass.c``."""

    _fields_ = [
        ("groups", ctypes.c_int64),
        ("row", ctypes.c_void_p),
        ("first_row", ctypes.c_void_p),
        ("inputs", OperandStruct),
        ("outputs", OperandStruct),
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
    if OnePassLinear.fits(in_pattern, out_pattern):
        return OnePassLinear(in_pattern, out_pattern, leading_shape, weight)
    return GroupedLinear(in_pattern, out_pattern, leading_shape, weight)


class OnePassLinear(GroupedLinear):
    """A :class:`.GroupedLinear` whose groups keep whole panels of the units."""

    @staticmethod
    def fits(in_pattern: RowPattern | None, out_pattern: RowPattern | None) -> bool:
        """Whether the patterns are interleaved and their groups keep whole panels."""
        patterns = [p for p in (in_pattern, out_pattern) if p is not None]
        return bool(patterns) and all(p.n_groups > 1 and p.block_size % PANEL == 0 for p in patterns)

    def __init__(
        self,
        in_pattern: RowPattern | None,
        out_pattern: RowPattern | None,
        leading_shape: tuple[int, ...],
        weight: Tensor,
    ) -> None:
        super().__init__(in_pattern, out_pattern, leading_shape, weight)
        pattern = in_pattern or out_pattern
        assert pattern is not None
        self._row = pattern.row_order(leading_shape)
        rows = row_counts(leading_shape, self.n_groups)
        self._first_row = _starts(rows)
        self._in_panels, self._out_panels = _kept_panels(in_pattern), _kept_panels(out_pattern)
        sides = ((in_pattern, self.inputs.n), (out_pattern, self.outputs.n))
        counts = ([n] * self.n_groups if p is None else p.counts for p, n in sides)
        multiplies = sum(map(math.prod, zip(rows, *counts, strict=True)))
        self._threads = 1 if multiplies < _SMALL else torch.get_num_threads()

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False, scale: float = 1.0
    ) -> Tensor:
        y = self.outputs.new(x)
        if self.run("product", x, y, weight, bias):
            return activate(y, relu, scale)
        return super().product(x, weight, bias, relu, scale)

    def gradients(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        wanted: Sequence[bool],
        y: Tensor | None = None,
        scale: float = 1.0,
    ) -> Gradients:
        return self.each_gradient(dy, x, weight, wanted, y, scale)

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        dx = self.inputs.new(dy)
        return dx if self.run("input_grad", dx, dy, weight) else super().input_grad(dy, weight)

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        grad = buffer((self.outputs.n, self.inputs.n), dy, exact=True)
        return grad if self.run("weight_grad", x, dy, grad) else super().weight_grad(dy, x)

    def run(self, name: str, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        """Call a compiled function if it supports these tensors.

        Args:
            name: ``product``, ``input_grad`` or ``weight_grad``, which write to ``y``, ``x`` or ``weight``.
            x: Inputs, or their gradient.
            y: Outputs, or their gradient.
            weight: Weight ``[n_out, n_in]``, or its gradient.
            bias: ``[n_out]`` or None.

        Returns:
            Whether the function was called.
        """
        x, y = x.contiguous(), y.contiguous()
        bias = None if bias is None else bias.contiguous()
        native = native_for([x, y, weight] if bias is None else [x, y, weight, bias])
        if native is None or not (x.numel() and y.numel()):
            return False
        inputs, outputs = _operand(self.inputs, x, self._in_panels), _operand(self.outputs, y, self._out_panels)
        w_output, w_input = weight.stride()
        if name == "input_grad":
            inputs, outputs, w_output, w_input = outputs, inputs, w_input, w_output
        layer = LayerStruct(
            groups=self.n_groups,
            row=self._row.data_ptr(),
            first_row=self._first_row.data_ptr(),
            inputs=inputs,
            outputs=outputs,
            weight=weight.data_ptr(),
            w_output=w_output,
            w_input=w_input,
            bias=None if bias is None else bias.data_ptr(),
        )
        if name == "weight_grad":
            native.one_pass_weight_grad(ctypes.byref(layer), self._threads, is_large(weight))
        else:
            native.one_pass_product(ctypes.byref(layer), self._threads)
        return True


def _operand(of: GroupedUnits, values: Tensor, panels: tuple[Tensor, Tensor] | None) -> OperandStruct:
    panel, first_panel = (None, None) if panels is None else (t.data_ptr() for t in panels)
    return OperandStruct(of.n, panel, first_panel, values.data_ptr())


def _starts(counts: list[int]) -> Tensor:
    """Start of each of several consecutive groups, and the end of the last one."""
    return torch.tensor([0, *accumulate(counts)], device="cpu")


def _kept_panels(pattern: RowPattern | None) -> tuple[Tensor, Tensor] | None:
    """Panels of all groups, group after group, and the start of each group's; None without a pattern."""
    if pattern is None:
        return None
    kept = [_panels(pattern.units(group), pattern) for group in range(pattern.n_groups)]
    return torch.cat(kept), _starts([len(panels) for panels in kept])


def _panels(units: Units, pattern: RowPattern) -> Tensor:
    first, per_block = units.starts // PANEL, pattern.block_size // PANEL
    if per_block == 1:
        return first
    panels = (first[:, None] + torch.arange(per_block, device="cpu")).view(-1)
    return panels[panels * PANEL < pattern.n]  # the last block may be shorter
