"""LSTM recurrence over ready-made gate inputs, in plain PyTorch calls with a hand-written backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from approxdrop_lightning.ops.native import library

#: From this hidden size on, packing the recurrent weight once pays for itself within some twenty steps.
_PACK_FROM = 400


def _adder(weight: Tensor, batch: int) -> Callable[[Tensor, Tensor, Tensor], None]:
    """``(a, b, out)`` does ``out = b + a @ weight.T``, many times with one weight.

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
        return lambda a, b, out: out.copy_(product(a, b, packed, None, "add"))
    transposed = weight.t()
    return lambda a, b, out: torch.addmm(b, a, transposed, out=out)


class _LSTMSequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, batch, hidden = gates.shape[0], gates.shape[1], gates.shape[2] // 4
        acts = torch.empty_like(gates, memory_format=torch.contiguous_format)
        h = gates.new_empty(steps + 1, batch, hidden)
        c = gates.new_empty(steps + 1, batch, hidden)
        tanh_c = gates.new_empty(steps, batch, hidden)
        h[0], c[0] = h0, c0
        add_recurrent = _adder(weight, batch)
        # Views are taken once: per step, cutting them costs as much as the pointwise work on them.
        sigmoids_if = acts[..., : 2 * hidden].unbind(0)
        i, f, g, o = (part.unbind(0) for part in acts.chunk(4, dim=-1))
        for t, (gates_t, act, h_t, c_t, c_next, h_next, tanh_t) in enumerate(
            zip(
                gates.unbind(0),
                acts.unbind(0),
                h.unbind(0),
                c.unbind(0),
                c[1:].unbind(0),
                h[1:].unbind(0),
                tanh_c.unbind(0),
                strict=False,
            )
        ):
            add_recurrent(h_t if kept is None else h_t.index_select(1, kept), gates_t, act)
            sigmoids_if[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            torch.mul(f[t], c_t, out=c_next)
            c_next.addcmul_(i[t], g[t])
            torch.tanh(c_next, out=tanh_t)
            torch.mul(o[t], tanh_t, out=h_next)
        ctx.save_for_backward(acts, h, c, tanh_c, weight, kept)
        return h[1:].clone(), h[-1].clone(), c[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_all: Tensor, dh_last: Tensor, dc_last: Tensor) -> tuple[Tensor | None, ...]:
        acts, h, c, tanh_c, weight, kept = ctx.saved_tensors
        steps, batch, hidden = tanh_c.shape
        # d(gate before its nonlinearity) is dc (for i, f, g) or dh (for o) times a factor that does not depend
        # on later steps: all factors are formed at once, in the buffer that becomes the gradient.
        i, f, g, o = acts.chunk(4, dim=-1)
        dgates = torch.empty_like(acts)
        torch.mul(g, i - i * i, out=dgates[..., :hidden])
        torch.mul(c[:-1], f - f * f, out=dgates[..., hidden : 2 * hidden])
        torch.mul(i, 1 - g * g, out=dgates[..., 2 * hidden : 3 * hidden])
        torch.mul(tanh_c, o - o * o, out=dgates[..., 3 * hidden :])
        dc_by_dh = o * (1 - tanh_c * tanh_c)

        add_back = _adder(weight.t(), batch) if kept is None else None
        zeros = torch.zeros_like(dh_last)
        dc = dc_last.clone()
        dh = dh_last + dh_all[-1]
        for t in range(steps - 1, -1, -1):
            dc.addcmul_(dh, dc_by_dh[t])
            by_cell = dgates[t, :, : 3 * hidden].view(batch, 3, hidden)
            by_cell *= dc.unsqueeze(1)
            dgates[t, :, 3 * hidden :] *= dh
            dc *= f[t]
            earlier = dh_all[t - 1] if t else zeros
            if add_back is not None:
                add_back(dgates[t], earlier, dh)
            else:
                dh = earlier.index_add(1, kept, dgates[t] @ weight)
        flat = dgates.view(steps * batch, 4 * hidden)
        inputs = h[:-1] if kept is None else h[:-1].index_select(2, kept)
        dweight = flat.t() @ inputs.reshape(steps * batch, -1) if ctx.needs_input_grad[3] else None
        return dgates, dh, dc, dweight, None


def sequence(
    gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(h, h_T, c_T)``; ``weight`` is ``[4 * H, kept]`` and ``kept`` the recurrent inputs it reads, or None."""
    return _LSTMSequence.apply(gates, h0, c0, weight, kept)
