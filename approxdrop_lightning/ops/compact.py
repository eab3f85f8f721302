"""Gather and multiply: products over kept units only, in plain PyTorch calls, on any device.

Packed values are flat, group after group, each group a row-major matrix ``[rows of the group, kept units of
the group]``. Elementwise functions need not know; the groups need not be of one size; and what one layer
packs the next one reads without a copy. Where all groups are of one size, their products are one batched
product.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from approxdrop_lightning.pattern import RowPattern


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pattern: RowPattern) -> Tensor:
        ctx.pattern, ctx.shape = pattern, x.shape
        index = pattern.flat_index(tuple(x.shape[:-1])).to(x.device)
        ctx.save_for_backward(index)
        return x.reshape(-1).index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        dense = grad.new_zeros(ctx.shape)
        dense.view(-1)[index] = grad.reshape(-1)
        return dense, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
        index = pattern.flat_index(leading_shape).to(values.device)
        ctx.save_for_backward(index)
        ctx.shape = values.shape
        dense = values.new_zeros(*leading_shape, pattern.n)
        dense.view(-1)[index] = values.reshape(-1)
        return dense

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.reshape(-1).index_select(0, index).view(ctx.shape), None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_pattern: RowPattern | None,
        out_pattern: RowPattern | None,
        leading_shape: tuple[int, ...],
    ) -> Tensor:
        groups = _Groups(in_pattern, out_pattern, leading_shape, weight)
        xs = groups.inputs(x)
        weights = groups.weights(weight)
        buffer, y = groups.new_output(x)
        _multiply(xs, [w.t() for w in weights], y)
        if bias is not None:
            for y_g, out in zip(y, groups.out_units, strict=True):
                y_g += bias if out is None else bias[out]
        ctx.groups, ctx.bias, ctx.x_shape = groups, bias is not None, x.shape
        ctx.save_for_backward(*xs, *weights)
        return groups.output(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups: _Groups = ctx.groups
        xs, weights = ctx.saved_tensors[: groups.count], ctx.saved_tensors[groups.count :]
        dys = groups.output_grads(grad)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            buffer, dxs = groups.new_input(grad)
            _multiply(dys, weights, dxs)
            dx = groups.input_grad(buffer).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            dw = groups.weight_grad(dys, xs)
        if ctx.bias and ctx.needs_input_grad[2]:
            db = groups.bias_grad(dys)
        return dx, dw, db, None, None, None


def _multiply(a: list[Tensor], b: list[Tensor], out: list[Tensor]) -> None:
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


class _Groups:
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
        blocks = []
        for out, units in zip(self.out_units, self.in_units, strict=True):
            if isinstance(out, Tensor):
                block = weight.index_select(0, out)
            else:
                block = weight if out is None else weight[out]
            if isinstance(units, Tensor):
                block = block.index_select(1, units)
            elif units is not None:
                block = block[:, units].contiguous()
            blocks.append(block)
        return blocks

    def weight_grad(self, dys: list[Tensor], xs: list[Tensor]) -> Tensor:
        """Dense gradient, each group's product written straight into the units it has kept."""
        grad = self._new_grad(dys[0], self.shape)
        overlap = self._overlap
        for dy, x, out, units in zip(dys, xs, self.out_units, self.in_units, strict=True):
            if isinstance(out, Tensor) and units is not None:
                columns = (
                    units if isinstance(units, Tensor) else torch.arange(grad.shape[1], device=grad.device)[units]
                )
                index = (out[:, None], columns)
                product = dy.t() @ x
                grad[index] = grad[index] + product if overlap else product
            elif isinstance(out, Tensor):
                (grad.index_add_ if overlap else grad.index_copy_)(0, out, dy.t() @ x)
            elif isinstance(units, Tensor):
                target = grad if out is None else grad[out]
                (target.index_add_ if overlap else target.index_copy_)(1, units, dy.t() @ x)
            elif units is not None:
                target = grad[:, units] if out is None else grad[out, units]
                target.copy_(dy.t() @ x)
            else:
                torch.mm(dy.t(), x, out=grad if out is None else grad[out])
        return grad

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

    @property
    def _overlap(self) -> bool:
        """Whether two groups may read the same entry of the weight."""
        patterns = [p for p in (self.in_pattern, self.out_pattern) if p is not None]
        return self.count > 1 and (
            all(not p.interleave for p in patterns) or any(p.interleave and p.keep > 1 for p in patterns)
        )

    def _new_grad(self, like: Tensor, shape: torch.Size) -> Tensor:
        """Empty where the groups together write every entry once: one side, all cells; else zeros."""
        patterns = [p for p in (self.in_pattern, self.out_pattern) if p is not None]
        covered = len(patterns) == 1 and patterns[0].interleave and patterns[0].keep == 1
        return like.new_empty(shape) if covered else like.new_zeros(shape)


def pack(x: Tensor, pattern: RowPattern) -> Tensor:
    """Values that the pattern keeps of a dense ``[*leading, n]``: flat, group after group."""
    return _Pack.apply(x, pattern)


def unpack(values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
    """Dense ``[*leading, n]`` with zeros where the pattern drops; inverse of :func:`pack`."""
    return _Unpack.apply(values, pattern, leading_shape)


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_pattern: RowPattern | None,
    out_pattern: RowPattern | None,
    leading_shape: tuple[int, ...],
) -> Tensor:
    """Products over kept units only.

    Args:
        x: Dense ``[*leading, n_in]``, or packed values if ``in_pattern`` is given.
        weight: ``[n_out, n_in]``, dense; its gradient is dense as well.
        bias: ``[n_out]`` or None.
        in_pattern: What is kept of the inputs.
        out_pattern: What is kept of the outputs.
        leading_shape: Shape of the batch.

    Returns:
        Rows ``[R, n_out]``, or packed values if ``out_pattern`` is given; contiguous, possibly flat.
    """
    return _RowLinear.apply(x, weight, bias, in_pattern, out_pattern, leading_shape)


class _SelectColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.shape = weight.shape
        ctx.save_for_backward(kept)
        return weight.index_select(1, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(1, kept, grad), None


def select_columns(weight: Tensor, pattern: RowPattern) -> Tensor:
    """Kept columns of a weight, ``[n_out, n_kept]``; the gradient is dense."""
    return _SelectColumns.apply(weight, pattern.kept.to(weight.device))
