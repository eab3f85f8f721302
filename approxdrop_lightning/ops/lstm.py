"""LSTM recurrence over ready-made gate inputs, with a hand-written backward for the whole sequence.

The pointwise part of a step is one compiled function where there is a compiler (``kernels.c``), else some PyTorch
calls; the recurrent products are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from approxdrop_lightning.ops.blocks import buffer
from approxdrop_lightning.ops.native import library
from approxdrop_lightning.ops.registry import has_triton

#: From this hidden size on, packing the recurrent weight once pays for itself within some twenty steps.
_PACK_FROM = 400


def _adder(weight: Tensor, batch: int) -> Callable[[Tensor, Tensor], Tensor]:
    """``(a, b)`` gives ``b + a @ weight.T``, many times with one weight.

    The products are thin (``batch`` rows), so reading the weight decides. oneDNN's packed layout, which PyTorch's own
    compiler uses on the CPU too, is read nearly twice as fast; where it is not to be had, the plain product serves.
    """
    if (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and min(weight.shape) >= _PACK_FROM
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    ):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch)
        product = torch.ops.mkldnn._linear_pointwise.binary
        return lambda a, b: product(a, b, packed, None, "add")
    transposed = weight.t()
    return lambda a, b: torch.addmm(b, a, transposed)


def _forward_step(gates: Tensor, c: Tensor, acts: Tensor, c_next: Tensor, tanh_c: Tensor, h_next: Tensor) -> None:
    """``gates`` before their nonlinearity; the last four are written."""
    native = _native(gates)
    if native is not None:
        native.lstm_forward(
            *(t.data_ptr() for t in (gates, c, acts, c_next, tanh_c, h_next)), *c.shape, torch.get_num_threads()
        )
        return
    hidden = c.shape[1]
    torch.sigmoid(gates, out=acts)
    i, f, g, o = acts.chunk(4, dim=-1)
    torch.tanh(gates[:, 2 * hidden : 3 * hidden], out=g)
    torch.mul(f, c, out=c_next)
    c_next.addcmul_(i, g)
    torch.tanh(c_next, out=tanh_c)
    torch.mul(o, tanh_c, out=h_next)


def _backward_step(
    acts: Tensor, c: Tensor, tanh_c: Tensor, dh_out: Tensor, dh_later: Tensor, dc: Tensor, dgates: Tensor
) -> None:
    """``dgates`` is written, and ``dc`` becomes that of the step before."""
    native = _native(acts)
    if native is not None:
        native.lstm_backward(
            *(t.data_ptr() for t in (acts, c, tanh_c, dh_out, dh_later, dc, dgates)),
            *c.shape,
            torch.get_num_threads(),
        )
        return
    i, f, g, o = acts.chunk(4, dim=-1)
    di, df, dg, do = dgates.chunk(4, dim=-1)
    dh = dh_out + dh_later
    dc.addcmul_(dh, o * (1 - tanh_c * tanh_c))
    torch.mul(dc * g, i - i * i, out=di)
    torch.mul(dc * c, f - f * f, out=df)
    torch.mul(dc * i, 1 - g * g, out=dg)
    torch.mul(dh * tanh_c, o - o * o, out=do)
    dc *= f


def _native(tensor: Tensor) -> Any:
    return library() if tensor.device.type == "cpu" and tensor.dtype == torch.float32 else None


class _LSTMSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        gates = gates.contiguous()
        steps, batch, hidden = gates.shape[0], gates.shape[1], gates.shape[2] // 4
        acts = buffer(tuple(gates.shape), gates)
        h = buffer((steps + 1, batch, hidden), gates)
        c = buffer((steps + 1, batch, hidden), gates)
        tanh_c = buffer((steps, batch, hidden), gates)
        h[0], c[0] = h0, c0
        add_recurrent = _adder(weight, batch)
        # Views are taken once: cutting them at each step costs as much as the pointwise work on them.
        views = (gates, acts, h, c, c[1:], tanh_c, h[1:])
        for gates_t, acts_t, h_t, c_t, c_next, tanh_t, h_next in zip(*(v.unbind(0) for v in views), strict=False):
            inputs = h_t if kept is None else h_t.index_select(1, kept)
            _forward_step(add_recurrent(inputs, gates_t), c_t, acts_t, c_next, tanh_t, h_next)
        ctx.save_for_backward(acts, h, c, tanh_c, weight, kept)
        return h[1:].clone(), h[-1].clone(), c[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_all: Tensor, dh_last: Tensor, dc_last: Tensor) -> tuple[Tensor | None, ...]:
        acts, h, c, tanh_c, weight, kept = ctx.saved_tensors
        steps, batch, hidden = tanh_c.shape
        dgates = buffer(tuple(acts.shape), acts)
        add_back = _adder(weight.t(), batch)
        zeros = dh_last.new_zeros(batch, weight.shape[1])
        dc, dh = dc_last.clone(), dh_last.contiguous()
        views = (acts, c, tanh_c, dh_all.contiguous(), dgates)
        views = reversed(list(zip(*(v.unbind(0) for v in views), strict=False)))
        for acts_t, c_t, tanh_t, dh_t, dgates_t in views:
            _backward_step(acts_t, c_t, tanh_t, dh_t, dh, dc, dgates_t)
            dh = add_back(dgates_t, zeros)
            if kept is not None:
                dh = torch.zeros_like(dh_last).index_copy_(1, kept, dh)
        flat = dgates.view(steps * batch, 4 * hidden)
        inputs = h[:-1] if kept is None else h[:-1].index_select(2, kept)
        dweight = None
        if ctx.needs_input_grad[3]:
            dweight = torch.mm(flat.t(), inputs.reshape(steps * batch, -1), out=buffer(tuple(weight.shape), weight))
        return dgates, dh, dc, dweight, None


def _has_kernels(gates: Tensor) -> bool:
    """Whether Triton kernels run the sequence."""
    return gates.is_cuda and gates.dtype != torch.float64 and has_triton()


def sequence(
    gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(h, h_T, c_T)``; ``weight`` is ``[4 * H, kept]`` and ``kept`` the recurrent inputs it reads, or None."""
    if _has_kernels(gates):
        from approxdrop_lightning.ops import lstm_ops

        return lstm_ops.sequence(gates, h0, c0, weight, kept)
    return _LSTMSequence.apply(gates, h0, c0, weight, kept)
