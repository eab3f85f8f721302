"""The compiled C products as operators of a graph, where they beat a batched product of gathered weights.

They read and write kept units in place: no part of a weight is copied, and its gradient is written once. To the
compiler each is an opaque call, with 0.1 to 0.2 ms of host time, so only large products use them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.graph.layout import Layout, TableUse
from approxdrop_lightning.graph.weights import expand_units
from approxdrop_lightning.ops.native.library import library
from approxdrop_lightning.ops.row_linear.groups import GroupedLinear
from approxdrop_lightning.ops.row_linear.one_pass import PANEL, linear_between
from approxdrop_lightning.patterns.row import RowPattern

#: Fewest executed multiplies of a product for which an opaque call is worth its host time.
LEAST = 10_000_000

_LIBRARY = torch.library.Library("approxdrop", "FRAGMENT")
_LIBRARY.define(
    "product(Tensor x, Tensor weight, Tensor? bias, Tensor table, int[] inside, int[] outside, int groups) -> Tensor"
)
_LIBRARY.define(
    "input_grad(Tensor dy, Tensor weight, Tensor table, int[] inside, int[] outside, int groups) -> Tensor"
)
_LIBRARY.define(
    "weight_grad(Tensor dy, Tensor x, Tensor weight, Tensor table, int[] inside, int[] outside, int groups) -> Tensor"
)
#: By uses, rows and weight: stamp of the table, and the layer with its index lists. One layer serves forward and
#: backward of a step.
_LAYERS: dict[tuple[Any, ...], tuple[int, GroupedLinear]] = {}
#: Number of layers that are kept.
_MOST = 4096


def serves(weight: Tensor, x: Tensor, inside: TableUse | None, outside: TableUse | None, chunks: int) -> bool:
    """Whether the C products support a layer and are faster."""
    if not weight.is_cpu or weight.dtype != torch.float32 or x.dtype != torch.float32 or chunks > 1:
        return False
    if torch.is_autocast_enabled("cpu") or isinstance(x.shape[-2], torch.SymInt) or library() is None:
        return False
    uses = [use for use in (inside, outside) if use is not None]
    if not (all(map(_is_row_pattern, uses)) or all(map(_has_panels, uses))):
        return False
    executed = x.numel() * (outside.layout.width if outside is not None else weight.shape[0])
    return executed >= LEAST


def _is_row_pattern(use: TableUse) -> bool:
    """Whether the layout is that of a :class:`RowPattern` with as many cells as there are blocks."""
    s = use.layout
    if s.groups == 1:
        return s.orders == 1
    if 2 * s.kept > s.blocks:
        return s.groups == 2 and s.shift == s.blocks - s.kept and s.kept < s.blocks
    return s.shift == s.kept and s.blocks // s.kept == s.groups


def _has_panels(use: TableUse) -> bool:
    """Whether the one-pass product serves the layout, whatever its groups have in common."""
    return use.layout.groups > 1 and use.block % PANEL == 0


class _TablePattern(RowPattern):
    """A pattern whose groups are those of a layout."""

    layout: Layout

    @property
    def _shift(self) -> int:
        return self.layout.shift


def _pattern(table: Tensor, numbers: list[int]) -> RowPattern | None:
    if not numbers:
        return None
    use = _use(numbers)
    s, place = use.layout, use.place(table)
    pattern = _TablePattern.unchecked(
        n=s.n, dp=s.blocks, offset=0, keep=s.kept, interleave=s.groups > 1,
        order=(place[0] if s.orders == 1 else place).clone(), block_size=s.block,
    )  # fmt: skip
    vars(pattern).update(layout=s, n_groups=s.all_groups)
    return pattern


def _numbers(use: TableUse | None) -> list[int]:
    """A use as an argument of an operator. Its scale is left out: products are not scaled."""
    return [] if use is None else [use.at, *map(int, use.layout)]


def _use(numbers: list[int]) -> TableUse:
    at, n, block, kept, groups, shift, orders, spare = numbers
    return TableUse(at, 1.0, n, block, kept, groups, shift, orders, bool(spare))


def _layer(weight: Tensor, table: Tensor, inside: list[int], outside: list[int], rows: int) -> GroupedLinear:
    key = (table.data_ptr(), *inside, None, *outside, rows, *weight.shape)
    stamp = int(table[0])
    known, layer = _LAYERS.get(key, (0, None))
    if layer is None or known != stamp:
        layer = linear_between(_pattern(table, inside), _pattern(table, outside), (rows,), weight)
        if len(_LAYERS) >= _MOST:
            _LAYERS.clear()
        _LAYERS[key] = stamp, layer
    return layer


def _shape(numbers: list[int], n: int, rows: int, groups: int) -> tuple[int, ...]:
    if not numbers:
        return (rows, n)
    return (groups, rows // groups, _use(numbers).layout.width)


def _rows(x: Tensor, numbers: list[int]) -> int:
    return x.shape[0] * x.shape[1] if numbers else x.shape[0]


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, inside: list[int], outside: list[int], groups: int
) -> Tensor:
    rows = _rows(x, inside)
    y = _layer(weight, table, inside, outside, rows).product(x.contiguous(), weight, bias)
    return y.view(_shape(outside, weight.shape[0], rows, groups))


def _input_grad(
    dy: Tensor, weight: Tensor, table: Tensor, inside: list[int], outside: list[int], groups: int
) -> Tensor:
    rows = _rows(dy, outside)
    dx = _layer(weight, table, inside, outside, rows).input_grad(dy.contiguous(), weight)
    return dx.view(_shape(inside, weight.shape[1], rows, groups))


def _weight_grad(
    dy: Tensor, x: Tensor, weight: Tensor, table: Tensor, inside: list[int], outside: list[int], groups: int
) -> Tensor:
    layer = _layer(weight, table, inside, outside, _rows(x, inside))
    return layer.weight_grad(dy.contiguous(), x.contiguous())


for _name, _function in (("product", _product), ("input_grad", _input_grad), ("weight_grad", _weight_grad)):
    _LIBRARY.impl(_name, _function, "CPU")


def _fake_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, inside: list[int], outside: list[int], groups: int
) -> Tensor:
    return x.new_empty(_shape(outside, weight.shape[0], _rows(x, inside), groups))


def _fake_input_grad(
    dy: Tensor, weight: Tensor, table: Tensor, inside: list[int], outside: list[int], groups: int
) -> Tensor:
    return dy.new_empty(_shape(inside, weight.shape[1], _rows(dy, outside), groups))


def _fake_weight_grad(
    dy: Tensor, x: Tensor, weight: Tensor, table: Tensor, inside: list[int], outside: list[int], groups: int
) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


for _name, _function in (
    ("product", _fake_product),
    ("input_grad", _fake_input_grad),
    ("weight_grad", _fake_weight_grad),
):
    torch.library.register_fake(f"approxdrop::{_name}", _function, lib=_LIBRARY)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        table: Tensor,
        inside: TableUse | None,
        outside: TableUse | None,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, table)
        ctx.rest = (_numbers(inside), _numbers(outside), groups)
        return torch.ops.approxdrop.product(x, weight, bias, table, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, table = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.approxdrop.input_grad(dy, weight, table, *ctx.rest)
        if ctx.needs_input_grad[1]:
            dw = torch.ops.approxdrop.weight_grad(dy, x, weight, table, *ctx.rest)
        if ctx.needs_input_grad[2]:
            outside = ctx.rest[1]
            db = expand_units(dy.sum(1), table, _use(outside)) if outside else dy.sum(0)
        return dx, dw, db, None, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    inside: TableUse | None,
    outside: TableUse | None,
    groups: int,
) -> Tensor:
    """As :func:`.packed.linear`; dense tensors are ``[rows, n]``, padded to a multiple of ``groups``."""
    return _Linear.apply(x, weight, bias, table, inside, outside, groups)
