"""What each group of rows reads and writes of inputs, outputs and weight.

Packed values are flat, group after group, each group a row-major matrix ``[rows of the group, kept units of
the group]``. Elementwise functions need not know; the groups need not be of one size; and what one layer
packs the next one reads without a copy. Where all groups are of one size, their products are one batched
product.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from approxdrop_lightning.pattern import RowPattern


def multiply(a: list[Tensor], b: list[Tensor], out: list[Tensor]) -> None:
    """``out[g] = a[g] @ b[g]``: one batched product where the groups are slices of one buffer each."""
    stacks = [_stack(matrices) for matrices in (a, b, out)] if len(a) > 1 else [None]
    if all(stack is not None for stack in stacks):
        torch.bmm(stacks[0], stacks[1], out=stacks[2])
        return
    for a_g, b_g, out_g in zip(a, b, out, strict=True):
        torch.mm(a_g, b_g, out=out_g)


def _stack(matrices: list[Tensor]) -> Tensor | None:
    """The ``[groups, rows, columns]`` tensor whose slices the matrices are, if there is one."""
    first = matrices[0]
    step = first.numel()
    for g, matrix in enumerate(matrices):
        if (
            matrix.shape != first.shape
            or matrix.stride() != first.stride()
            or matrix.storage_offset() != first.storage_offset() + g * step
            or matrix.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return None
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride()))


_buffers = threading.local()


def _scratch(like: Tensor, shape: tuple[int, ...], slot: str) -> Tensor:
    """Uninitialised memory for what does not outlive an op.

    On the CPU fresh memory costs a page fault per 4 KB at each step, more than the copy that it is for; so one
    buffer per slot, thread and dtype is kept. Other devices have allocators that keep theirs.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape)
    key = f"{slot} {like.dtype}"
    buffer = getattr(_buffers, key, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=like.dtype)
        setattr(_buffers, key, buffer)
    return buffer[:size].view(shape)


class Groups:
    """What each group of rows reads and writes; one group of all rows where nothing is interleaved."""

    def __init__(
        self,
        in_pattern: RowPattern | None,
        out_pattern: RowPattern | None,
        leading_shape: tuple[int, ...],
        weight: Tensor,
    ) -> None:
        grouped = next((p for p in (in_pattern, out_pattern) if p is not None and p.interleave), None)
        self.in_pattern, self.out_pattern = in_pattern, out_pattern
        self.count = 1 if grouped is None else grouped.n_groups
        self.shape = weight.shape
        self.device = weight.device
        rows = (grouped or RowPattern(1, 1, 0)).row_groups(leading_shape)
        self.row_counts = [r.numel() for r in rows]
        self.rows = None if grouped is None else torch.cat(rows).to(self.device)
        self.in_units, self.out_units = self._units(in_pattern), self._units(out_pattern)

    def _units(self, pattern: RowPattern | None) -> list[Tensor | slice | None]:
        """Kept units of each group; None for all of them."""
        if pattern is None:
            return [None] * self.count
        cells = pattern.cells()
        units = [pattern.stride(g) or cells[g].to(self.device) for g in range(len(cells))]
        return units if len(units) == self.count else units * self.count

    def _widths(self, pattern: RowPattern | None, n: int) -> list[int]:
        if pattern is None:
            return [n] * self.count
        widths = [cell.numel() for cell in pattern.cells()]
        return widths if len(widths) == self.count else widths * self.count

    def _buffer(self, like: Tensor, pattern: RowPattern | None, n: int, slot: str) -> tuple[Tensor, list[Tensor]]:
        """A flat buffer, and it cut into the groups' matrices; scratch if :meth:`_ungather` copies out of it."""
        widths = self._widths(pattern, n)
        size = sum(r * w for r, w in zip(self.row_counts, widths, strict=True))
        if self._by_group(pattern) or self.rows is None:
            flat = like.new_empty(size)
        else:
            flat = _scratch(like, (size,), slot)
        return flat, self._cut(flat, widths)

    def _cut(self, flat: Tensor, widths: list[int]) -> list[Tensor]:
        sizes = [r * w for r, w in zip(self.row_counts, widths, strict=True)]
        shapes = zip(self.row_counts, widths, strict=True)
        return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]

    @staticmethod
    def _by_group(pattern: RowPattern | None) -> bool:
        """Whether values are packed by group; else they are rows in their order."""
        return pattern is not None and pattern.interleave

    def _gather(self, tensor: Tensor, pattern: RowPattern | None, n: int, slot: str | None = None) -> list[Tensor]:
        """Matrices of the groups; with ``slot`` a copy may lie in scratch memory."""
        if self._by_group(pattern):
            return self._cut(tensor.reshape(-1), self._widths(pattern, n))
        rows = tensor.reshape(sum(self.row_counts), n if pattern is None else pattern.n_kept)
        if self.rows is not None:
            out = None if slot is None else _scratch(rows, tuple(rows.shape), slot)
            rows = torch.index_select(rows, 0, self.rows, out=out)
        return list(rows.split(self.row_counts))

    def _ungather(self, flat: Tensor, pattern: RowPattern | None, n: int) -> Tensor:
        """From a buffer of matrices to values packed by group, or to rows in their order."""
        if self._by_group(pattern) or self.rows is None:
            return flat
        rows = flat.view(sum(self.row_counts), n if pattern is None else pattern.n_kept)
        return torch.empty_like(rows).index_copy_(0, self.rows, rows)

    def inputs(self, x: Tensor) -> list[Tensor]:
        return self._gather(x, self.in_pattern, self.shape[1])

    def output_grads(self, grad: Tensor) -> list[Tensor]:
        return self._gather(grad.contiguous(), self.out_pattern, self.shape[0], slot="out")

    def new_input(self, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self._buffer(like, self.in_pattern, self.shape[1], slot="in")

    def new_output(self, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self._buffer(like, self.out_pattern, self.shape[0], slot="out")

    def input_grad(self, flat: Tensor) -> Tensor:
        return self._ungather(flat, self.in_pattern, self.shape[1])

    def output(self, flat: Tensor) -> Tensor:
        return self._ungather(flat, self.out_pattern, self.shape[0])

    def weights(self, weight: Tensor) -> list[Tensor]:
        """The block of the weight that each group multiplies; rows at a stride are read in place."""
        heights, widths = self._widths(self.out_pattern, self.shape[0]), self._widths(self.in_pattern, self.shape[1])
        shapes = list(zip(heights, widths, strict=True))
        blocks = [None] * self.count
        if len(set(shapes)) == 1 and self.count > 1:
            blocks = list(weight.new_empty(self.count, *shapes[0]))  # one buffer: then the product is batched
        for g, (out, units) in enumerate(zip(self.out_units, self.in_units, strict=True)):
            if isinstance(out, Tensor):
                rows = torch.index_select(weight, 0, out, out=blocks[g] if units is None else None)
            else:
                rows = weight if out is None else weight[out]
            if units is None:
                blocks[g] = rows
            elif isinstance(units, Tensor):
                blocks[g] = torch.index_select(rows, 1, units, out=blocks[g])
            else:
                blocks[g] = rows[:, units].contiguous() if blocks[g] is None else blocks[g].copy_(rows[:, units])
        return blocks

    def weight_grad(self, dys: list[Tensor], xs: list[Tensor]) -> Tensor:
        """Dense gradient, each group's product written straight into the units it has kept."""
        grad = self._new_grad(dys[0])
        for dy, x, out, units in zip(dys, xs, self.out_units, self.in_units, strict=True):
            if isinstance(out, Tensor):
                # Copying whole rows is cheaper than writing single entries. Where a row is one group's only, what
                # that group leaves out of it is zero.
                own = self.count == 1 or self._by_group(self.out_pattern)
                size = (dy.shape[1], self.shape[1])
                rows = _scratch(grad, size, "rows") if own else grad.index_select(0, out)
                _write_columns(rows, units, dy.t() @ x, clear=own)
                grad.index_copy_(0, out, rows)
            elif out is None:
                _write_columns(grad, units, dy.t() @ x, clear=False)
            elif units is None:
                torch.mm(dy.t(), x, out=grad[out])
            else:
                _write_columns(grad[out], units, dy.t() @ x, clear=False)
        return grad

    def add_bias(self, ys: list[Tensor], bias: Tensor) -> None:
        """Add the bias of each group's units, in place."""
        for y, out in zip(ys, self.out_units, strict=True):
            y += bias if out is None else bias[out]

    def bias_grad(self, dys: list[Tensor]) -> Tensor:
        if self.out_pattern is None:
            return sum(dy.sum(0) for dy in dys)
        grad = dys[0].new_zeros(self.shape[0])
        for dy, out in zip(dys, self.out_units, strict=True):
            if isinstance(out, Tensor):
                grad.index_add_(0, out, dy.sum(0))
            else:
                grad[out] += dy.sum(0)
        return grad

    def _new_grad(self, like: Tensor) -> Tensor:
        """Dense gradient of the weight: empty where the groups together write every entry, else zeros."""
        outside, inside = self.out_pattern, self.in_pattern
        if outside is not None and outside.interleave and outside.keep == 1:
            # Every row is some group's; written as a whole, unless it is addressed by a stride.
            covered = inside is None or outside.stride(0) is None
        else:
            covered = outside is None and inside is not None and inside.interleave and inside.keep == 1
        return like.new_empty(self.shape) if covered else like.new_zeros(self.shape)


def _write_columns(target: Tensor, units: Tensor | slice | None, values: Tensor, clear: bool = True) -> None:
    """Write columns of a matrix; with ``clear`` the others become zero."""
    if units is None:
        target.copy_(values)
        return
    if clear:
        target.zero_()
    if isinstance(units, Tensor):
        target.scatter_(1, units.expand(values.shape), values)  # twice as fast as index_copy_ along a row
    else:
        target[:, units] = values
