"""The compact backend: the whole recurrence is one autograd function with a hand-written backward.

In float32 on the CPU, all steps run in one compiled function (``recurrence.c``); otherwise each step takes a few
PyTorch calls.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from approxdrop_lightning.ops.native.buffers import buffer
from approxdrop_lightning.ops.native.library import library
from approxdrop_lightning.ops.native.product import Submatrix, multiply

#: Columns of the widest panel that compiled code packs (``COLUMNS`` in ``tile.h``).
_PANEL_COLUMNS = 32


def _native(gates: Tensor, weight: Tensor) -> ctypes.CDLL | None:
    """The compiled kernels if they support these tensors, otherwise None."""
    return library() if gates.is_cpu and gates.dtype == torch.float32 and gates.numel() and weight.numel() else None


def _packed_weight(gates: int, n: int, depth: int, like: Tensor) -> Tensor:
    """Memory for a weight packed in panels: ``n`` columns of ``depth`` per gate, with the last panel padded."""
    return buffer((gates * (n + _PANEL_COLUMNS) * depth + _PANEL_COLUMNS,), like)


def _forward_step(gates: Tensor, c: Tensor, acts: Tensor, c_next: Tensor, h_next: Tensor) -> None:
    """Forward step from the pre-activation gates; writes ``acts``, ``c_next`` and ``h_next``."""
    hidden = c.shape[1]
    torch.sigmoid(gates, out=acts)
    i, f, g, o = acts.chunk(4, dim=-1)
    torch.tanh(gates[:, 2 * hidden : 3 * hidden], out=g)
    torch.mul(f, c, out=c_next)
    c_next.addcmul_(i, g)
    torch.mul(o, c_next.tanh(), out=h_next)


def _backward_step(acts: Tensor, c: Tensor, c_next: Tensor, dh: Tensor, dc: Tensor, dgates: Tensor) -> None:
    """Backward step; writes ``dgates``, and replaces ``dc`` by the gradient of ``c``."""
    tanh_c = c_next.tanh()
    i, f, g, o = acts.chunk(4, dim=-1)
    di, df, dg, do = dgates.chunk(4, dim=-1)
    dc.addcmul_(dh, o * (1 - tanh_c * tanh_c))
    torch.mul(dc * g, i - i * i, out=di)
    torch.mul(dc * c, f - f * f, out=df)
    torch.mul(dc * i, 1 - g * g, out=dg)
    torch.mul(dh * tanh_c, o - o * o, out=do)
    dc *= f


class _LSTMSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        gates, weight = gates.contiguous(), weight.contiguous()
        steps, batch, hidden = gates.shape[0], gates.shape[1], gates.shape[2] // 4
        acts = buffer(tuple(gates.shape), gates)
        h = buffer((steps + 1, batch, hidden), gates)
        c = buffer((steps + 1, batch, hidden), gates)
        h[0], c[0] = h0, c0
        native = _native(gates, weight)
        if native is not None:
            depth = weight.shape[1]
            packed = _packed_weight(4, hidden, depth, gates)
            native.lstm_forward(
                *(t.data_ptr() for t in (gates, h, c, acts, weight)),
                None if kept is None else kept.data_ptr(), packed.data_ptr(),
                steps, batch, hidden, depth, torch.get_num_threads(),
            )  # fmt: skip
        else:
            for t in range(steps):
                inputs = h[t] if kept is None else h[t].index_select(1, kept)
                _forward_step(torch.addmm(gates[t], inputs, weight.t()), c[t], acts[t], c[t + 1], h[t + 1])
        ctx.save_for_backward(acts, h, c, weight, kept)
        return h[1:].clone(), h[-1].clone(), c[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_all: Tensor, dh_last: Tensor, dc_last: Tensor) -> tuple[Tensor | None, ...]:
        acts, h, c, weight, kept = ctx.saved_tensors
        steps, batch, hidden = acts.shape[0], acts.shape[1], acts.shape[2] // 4
        depth = weight.shape[1]
        dgates = buffer(tuple(acts.shape), acts)
        dh_all = dh_all.contiguous()
        dh, dc = (d.clone(memory_format=torch.contiguous_format) for d in (dh_last, dc_last))
        native = _native(acts, weight)
        if native is not None:
            packed = _packed_weight(1, depth, 4 * hidden, acts)
            native.lstm_backward(
                *(t.data_ptr() for t in (acts, c, dh_all, dh, dc, dgates, weight)),
                None if kept is None else kept.data_ptr(), packed.data_ptr(),
                steps, batch, hidden, depth, torch.get_num_threads(),
            )  # fmt: skip
        else:
            for t in reversed(range(steps)):
                _backward_step(acts[t], c[t], c[t + 1], dh + dh_all[t], dc, dgates[t])
                dh = dgates[t] @ weight
                if kept is not None:
                    dh = torch.zeros_like(dh_last).index_copy_(1, kept, dh)
        dweight = None
        if ctx.needs_input_grad[3]:
            inputs = h[:-1] if kept is None else h[:-1].index_select(2, kept)
            flat, rows = dgates.view(steps * batch, 4 * hidden), inputs.reshape(steps * batch, depth)
            dweight = buffer(tuple(weight.shape), weight, exact=True)
            multiply([(Submatrix.whole(flat).t, Submatrix.whole(rows), Submatrix.whole(dweight), False)])
        return dgates, dh, dc, dweight, None


def sequence(
    gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`approxdrop_lightning.ops.lstm.sequence`."""
    return _LSTMSequence.apply(gates, h0, c0, weight, kept)
