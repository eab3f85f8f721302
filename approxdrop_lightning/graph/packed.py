"""Functions of rewritten graphs, on packed values, in plain PyTorch calls that a compiler fuses.

Packed values are ``[groups, rows of a group, kept units]``, so that a layer is one batched product. All copies are
gathers, in the backward pass too: gathers fuse with the code before and after them, whereas scatters need zeroed
memory.

AOTAutograd traces these functions. ``use``, ``rows`` and ``leading`` are static (a leading size may be symbolic);
``table`` is the tensor that holds the patterns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from approxdrop_lightning.graph import native
from approxdrop_lightning.graph.layout import Rows, TableUse
from approxdrop_lightning.graph.weights import KeptWeights


def group_rows(x: Tensor, rows: Rows) -> Tensor:
    """``[*leading, n]`` to ``[groups, rows, n]``: a view unless rows are padded."""
    n = x.shape[-1]
    if rows.pad:
        x = torch.nn.functional.pad(x, (0, 0, 0, rows.pad))
    x = x.reshape(-1, n)
    if short := -x.shape[0] % rows.groups:
        x = torch.nn.functional.pad(x, (0, 0, 0, short))
    return x.view(-1, rows.groups, n).transpose(0, 1)


def ungroup_rows(y: Tensor, leading: Sequence[int], rows: Rows) -> Tensor:
    """Inverse of :func:`group_rows`."""
    return _unpadded(in_order(y), leading, rows)


def in_order(y: Tensor) -> Tensor:
    """``[groups, rows of a group, n]`` to ``[rows, n]``, padding included."""
    return y.transpose(0, 1).reshape(-1, y.shape[-1])


def _unpadded(y: Tensor, leading: Sequence[int], rows: Rows) -> Tensor:
    n = y.shape[-1]
    if rows.pad:
        y = y[: math.prod(leading[:-1]) * (leading[-1] + rows.pad)].view(*leading[:-1], leading[-1] + rows.pad, n)
        return y[..., : leading[-1], :].reshape(*leading, n)
    return y[: math.prod(leading)].view(*leading, n)


def pack(x: Tensor, table: Tensor, use: TableUse, rows: Rows, chunks: int = 1) -> Tensor:
    """The kept values of a dense ``[*leading, chunks * n]``."""
    s = use.layout
    if chunks > 1:
        return torch.cat([pack(part, table, use, rows) for part in x.chunk(chunks, -1)], -1)
    x = group_rows(x, rows).unflatten(-1, (s.blocks, s.block))
    group = torch.arange(s.all_groups, device=x.device)[:, None]
    return x[group, :, use.kept_blocks(table)].transpose(1, 2).flatten(2)


def pack_units(x: Tensor, table: Tensor, use: TableUse, chunks: int = 1) -> Tensor:
    """The kept ones of values per unit: ``[chunks * n]`` to ``[groups, 1, chunks * width]``."""
    return KeptWeights.apply(x.reshape(-1, 1), table, use, None, chunks).transpose(1, 2)


def pack_rows(x: Tensor, rows: Rows) -> Tensor:
    """Group values per row: ``[*leading, 1]`` to ``[groups, rows, 1]``."""
    return group_rows(x, rows)


def scaled(values: Tensor, table: Tensor, use: TableUse) -> Tensor:
    """Scale kept values; the value at a spare place that is not kept becomes zero."""
    return values * use.factors(table, values.dtype)


def unpack(values: Tensor, table: Tensor, use: TableUse, rows: Rows, leading: Sequence[int]) -> Tensor:
    """Dense ``[*leading, n]`` with zeros where a unit is dropped, by a gather that fuses with its readers."""
    s = use.layout
    values = values.unflatten(-1, (s.kept, s.block))
    first = s.shift * torch.arange(s.groups, device=values.device)
    at = (use.place(table)[:, None, :] - first[:, None]).reshape(s.all_groups, s.blocks)
    group = torch.arange(s.all_groups, device=values.device)[:, None]
    dense = values[group, :, at.clamp(0, s.kept - 1)]  # [groups, blocks, rows, block]
    dense = torch.where(((at >= 0) & (at < s.kept))[:, :, None, None], dense, 0).transpose(1, 2).flatten(2)
    return ungroup_rows(dense, leading, rows)


def mask(x: Tensor, table: Tensor, use: TableUse, rows: Rows) -> Tensor:
    """Dropout of a dense tensor as an elementwise function."""
    s, leading = use.layout, x.shape[:-1]
    row = torch.arange(math.prod(leading), device=x.device)
    if rows.pad:
        row = row + rows.pad * (row // leading[-1])
    keeps = use.keeps(table)[row % rows.groups]
    flat = x.reshape(-1, s.blocks, s.block)
    return torch.where(keeps[:, :, None], flat * use.scale, 0).view(x.shape)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    inside: TableUse | None,
    outside: TableUse | None,
    rows: Rows,
    chunks: int = 1,
    leading: Sequence[int] | None = None,
) -> Tensor:
    """A linear layer with packed inputs, outputs or both.

    Args:
        x: Packed if ``inside`` is given; otherwise dense ``[*leading, n_in]``.
        weight: ``[n_out, n_in]``.
        bias: ``[n_out]`` or None.
        table: The patterns.
        inside: Pattern of the inputs.
        outside: Pattern of the outputs; None: all are computed.
        rows: Assignment of rows to groups.
        chunks: Number of chunks of units among the outputs.
        leading: Leading shape of the output; needed without ``outside``.

    Returns:
        ``[groups, rows, chunks * width]`` if ``outside`` is given; otherwise ``[*leading, n_out]``.
    """
    if native.serves(weight, x, inside, outside, chunks):
        if inside is None:
            x = in_order(group_rows(x, rows))
        y = native.linear(x, weight, bias, table, inside, outside, rows.groups)
        return y if leading is None else _unpadded(y, leading, rows)
    if inside is None:
        x = group_rows(x, rows)
    part = KeptWeights.apply(weight, table, outside, inside, chunks)
    y = torch.bmm(x, part.transpose(1, 2)) if rows.groups > 1 else torch.matmul(x, part[0].t())
    if leading is not None:
        y = ungroup_rows(y, leading, rows)
        return y if bias is None else y + bias.to(y.dtype)
    if bias is None:
        return y
    kept = KeptWeights.apply(bias.view(-1, 1), table, outside, None, chunks)
    return y + kept.transpose(1, 2).to(y.dtype)


def prelu(values: Tensor, slopes: Tensor) -> Tensor:
    """PReLU with a slope per unit, both packed."""
    return torch.where(values > 0, values, slopes * values)
