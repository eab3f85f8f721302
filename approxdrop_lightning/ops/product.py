"""The one primitive of the compact backend: a product of parts of matrices, read and written where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from approxdrop_lightning.ops.blocks import buffer, put, take
from approxdrop_lightning.pattern import Units


@dataclass(frozen=True)
class Block:
    """``matrix[rows][:, columns]``, not copied.

    Attributes:
        matrix: ``[n, m]``, with unit stride along one of its dimensions.
        rows: Some of its rows, in an order.
        columns: Some of its columns, in an order.
    """

    matrix: Tensor
    rows: Units
    columns: Units

    @staticmethod
    def whole(matrix: Tensor) -> Block:
        """All of a matrix."""
        return Block(matrix, Units.every(matrix.shape[0]), Units.every(matrix.shape[1]))

    @property
    def t(self) -> Block:
        """Transposed."""
        return Block(self.matrix.t(), self.columns, self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the block."""
        return self.rows.count, self.columns.count

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the matrix, in its order."""
        return self.rows.is_all(self.matrix.shape[0]) and self.columns.is_all(self.matrix.shape[1])

    def copied(self) -> Tensor:
        """``[rows, columns]``: the matrix itself if the block is all of it."""
        if self.is_whole:
            return self.matrix
        if self.matrix.stride(1) != 1 and self.matrix.stride(0) == 1:
            return take(self.matrix.t(), self.columns, self.rows).t()
        return take(self.matrix, self.rows, self.columns)


def multiply(a: Block, b: Block, out: Block, add: bool = False) -> None:
    """``out = a @ b``, in place; with ``add``, ``out += a @ b``.

    Args:
        a: ``[M, K]``.
        b: ``[K, N]``.
        out: ``[M, N]`` of a row-major matrix. What else is in this matrix stays.
        add: Whether to add to what is there.
    """
    if 0 in out.shape:
        return
    left, right = a.copied(), b.copied()
    if out.is_whole:
        if add:
            out.matrix.addmm_(left, right)
        else:
            torch.mm(left, right, out=out.matrix)
        return
    values = out.copied() if add else buffer(out.shape, out.matrix)
    if add:
        values.addmm_(left, right)
    else:
        torch.mm(left, right, out=values)
    put(out.matrix, out.rows, out.columns, values, clear=False)
