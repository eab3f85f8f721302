"""Concatenation of units: ``torch.cat`` on packed values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.patterns.joined import JoinedPattern


def cat(values: tuple[Tensor, ...], pattern: JoinedPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """Concatenate the packed values of the pieces of a joined pattern.

    Args:
        values: Packed values of each piece, as returned by :func:`approxdrop_lightning.functional.pack`.
        pattern: Joined pattern of the pieces.
        leading_shape: Shape of the batch.

    Returns:
        Packed values of the concatenated units, equal to :func:`approxdrop_lightning.functional.pack` of them.
    """
    if not pattern.interleave:
        return torch.cat(values, dim=-1)
    return _Cat.apply(pattern, leading_shape, *values)


class _Cat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pattern: JoinedPattern, leading_shape: tuple[int, ...], *values: Tensor) -> Tensor:
        ctx.where = pattern, leading_shape
        joined = values[0].new_empty(sum(v.numel() for v in values))
        for whole, parts in _views(pattern, leading_shape, joined, values):
            torch.cat(parts, dim=1, out=whole)
        return joined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *_Split.apply(*ctx.where, grad)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pattern: JoinedPattern, leading_shape: tuple[int, ...], joined: Tensor) -> Any:
        ctx.where = pattern, leading_shape
        joined = joined.contiguous()
        rows = pattern.row_groups(leading_shape)
        sizes = [sum(r.count * piece.units(g).count for g, r in enumerate(rows)) for piece in pattern.pieces]
        values = tuple(joined.new_empty(size) for size in sizes)
        for whole, parts in _views(pattern, leading_shape, joined, values):
            for part, found in zip(parts, whole.split([part.shape[1] for part in parts], dim=1), strict=True):
                part.copy_(found)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, _Cat.apply(*ctx.where, *grads)


def _views(
    pattern: JoinedPattern, leading_shape: tuple[int, ...], joined: Tensor, values: tuple[Tensor, ...]
) -> list[tuple[Tensor, list[Tensor]]]:
    """For each group, its matrix and the views of the pieces that make up its columns, in order, cell by cell."""
    found = []
    at, places = 0, [0] * len(values)
    for group, rows in enumerate(pattern.row_groups(leading_shape)):
        count = pattern.units(group).count
        whole = joined[at : at + rows.count * count].view(rows.count, count)
        at += whole.numel()
        by_cell = []
        for i, (piece, flat) in enumerate(zip(pattern.pieces, values, strict=True)):
            count = piece.units(group).count
            matrix = flat[places[i] : places[i] + rows.count * count].view(rows.count, count)
            places[i] += matrix.numel()
            by_cell.append(matrix.split(piece.units_by_cell(group), dim=1))
        found.append((whole, [part for cell in zip(*by_cell, strict=True) for part in cell]))
    return found
