"""The one primitive of the compact backend: a product of parts of matrices, read and written where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.ops.blocks import buffer, put, take
from approxdrop_lightning.ops.native import library
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

    def cut(self, columns: slice) -> Block:
        """Some of the columns of a block that has all of its matrix."""
        return self if columns == slice(None) else Block.whole(self.matrix[:, columns])

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


def multiply(a: Block, b: Block, out: Block, bias: Tensor | None = None, add: bool = False) -> None:
    """``out = a @ b + bias``, in place; with ``add``, ``out += a @ b + bias``.

    In float32 on the CPU one compiled function reads and writes the blocks where they lie; elsewhere they are copied.

    Args:
        a: ``[M, K]``.
        b: ``[K, N]``.
        out: ``[M, N]`` of a row-major matrix. What else is in this matrix stays.
        bias: One entry for each column of ``b.matrix``, contiguous; None for none.
        add: Whether to add to what is there.
    """
    if 0 in out.shape:
        return
    native = _native(a.matrix, b.matrix, out.matrix)
    if native is not None and a.shape[1]:
        native.product(
            *a.shape, b.shape[1], *_part(a), *_part(b), *_part(out, row_major=True),
            None if bias is None else bias.data_ptr(), add, torch.get_num_threads(),
        )  # fmt: skip
        return
    values = out.copied() if add else out.matrix if out.is_whole else buffer(out.shape, out.matrix)
    if add:
        torch.addmm(values, a.copied(), b.copied(), out=values)
    else:
        torch.mm(a.copied(), b.copied(), out=values)
    if bias is not None:
        values += bias if b.columns.is_all(len(bias)) else bias[b.columns.index.to(bias.device)]
    if not out.is_whole:
        put(out.matrix, out.rows, out.columns, values, clear=False)


def _native(*matrices: Tensor) -> Any:
    # A dispatch mode (FlopCounterMode, for one) watches PyTorch's own calls: then these are what it shall see.
    if torch._C._len_torch_dispatch_stack() or not all(m.is_cpu and m.dtype == torch.float32 for m in matrices):
        return None
    return library()


def _part(block: Block, row_major: bool = False) -> tuple:
    matrix = block.matrix
    strides = matrix.stride()[:1] if row_major else matrix.stride()
    return matrix.data_ptr(), *strides, block.rows.runs, block.columns.runs
