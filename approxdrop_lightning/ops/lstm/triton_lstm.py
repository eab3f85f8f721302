"""The pointwise part of an LSTM step as Triton kernels, forward and backward; the products are the vendor's.

A step is one product and one launch. What the step after multiplies, the kept units of ``h``, is written by the same
launch, and their gradient is read by the one that goes backward: ``slots`` tells where a unit lies among them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from approxdrop_lightning.ops.triton.common import Specimen, specimens_of
from approxdrop_lightning.ops.triton.launch import Launch

_BLOCK = 256  # of few rows and some hundred units each: small blocks, so that they reach many processors
_OPTIONS = {"num_warps": 2, "num_stages": 3}


@triton.jit
def _tanh(x):
    # Its error is one rounding of 1, also near 0. ``libdevice`` has a better one, which the interpreter lacks.
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _load(pointer, live):
    return tl.load(pointer, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _slot(slots, unit, live):
    """Where units lie among the kept ones; below 0 where they do not."""
    if slots is None:
        slot = unit
    else:
        slot = tl.load(slots + unit, mask=live, other=-1)
    return slot


@triton.jit
def forward_step(gates, acts, c, c_next, h, kept, slots, H, K, gates_stride, BLOCK: tl.constexpr):
    """Activations, cell state and output, from inputs of the gates and their recurrent part, which ``acts`` holds."""
    row = tl.program_id(0)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = unit < H
    at, gates_at, acts_at = row * H + unit, gates + row * gates_stride + unit, acts + row * 4 * H + unit
    i = tl.sigmoid(_load(gates_at, live) + _load(acts_at, live))
    f = tl.sigmoid(_load(gates_at + H, live) + _load(acts_at + H, live))
    g = _tanh(_load(gates_at + 2 * H, live) + _load(acts_at + 2 * H, live))
    o = tl.sigmoid(_load(gates_at + 3 * H, live) + _load(acts_at + 3 * H, live))
    cell = f * _load(c + at, live) + i * g
    output = (o * _tanh(cell)).to(h.dtype.element_ty)
    tl.store(acts_at, i.to(acts.dtype.element_ty), mask=live)
    tl.store(acts_at + H, f.to(acts.dtype.element_ty), mask=live)
    tl.store(acts_at + 2 * H, g.to(acts.dtype.element_ty), mask=live)
    tl.store(acts_at + 3 * H, o.to(acts.dtype.element_ty), mask=live)
    tl.store(c_next + at, cell.to(c_next.dtype.element_ty), mask=live)
    tl.store(h + at, output, mask=live)
    slot = _slot(slots, unit, live)
    tl.store(kept + row * K + slot, output, mask=live & (slot >= 0))


@triton.jit
def backward_step(acts, c, c_next, dh, dh_kept, slots, dc, dgates, H, K, dh_stride, BLOCK: tl.constexpr):
    """Gradients of the gates' inputs; ``dc`` becomes that of the step before.

    That of ``h`` is the sum of ``dh``, from the output, and ``dh_kept``, from the step after.
    """
    row = tl.program_id(0)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = unit < H
    at, acts_at, dgates_at = row * H + unit, acts + row * 4 * H + unit, dgates + row * 4 * H + unit
    i, f = _load(acts_at, live), _load(acts_at + H, live)
    g, o = _load(acts_at + 2 * H, live), _load(acts_at + 3 * H, live)
    tanh_c = _tanh(_load(c_next + at, live))
    slot = _slot(slots, unit, live)
    d_output = _load(dh + row * dh_stride + unit, live) + _load(dh_kept + row * K + slot, live & (slot >= 0))
    d_cell = _load(dc + at, live) + d_output * o * (1.0 - tanh_c * tanh_c)
    d_i, d_f = d_cell * g * i * (1.0 - i), d_cell * _load(c + at, live) * f * (1.0 - f)
    d_g, d_o = d_cell * i * (1.0 - g * g), d_output * tanh_c * o * (1.0 - o)
    tl.store(dc + at, d_cell * f, mask=live)
    tl.store(dgates_at, d_i.to(dgates.dtype.element_ty), mask=live)
    tl.store(dgates_at + H, d_f.to(dgates.dtype.element_ty), mask=live)
    tl.store(dgates_at + 2 * H, d_g.to(dgates.dtype.element_ty), mask=live)
    tl.store(dgates_at + 3 * H, d_o.to(dgates.dtype.element_ty), mask=live)


def forward_launch(
    gates: Tensor, acts: Tensor, c: Tensor, c_next: Tensor, h: Tensor, kept: Tensor, slots: Tensor | None
) -> Launch:
    """One step forward.

    Args:
        gates: ``[B, 4 * H]``, input part; rows may lie apart.
        acts: ``[B, 4 * H]``, recurrent part; becomes ``i, f, g, o``.
        c: ``[B, H]``.
        c_next: ``[B, H]``, written.
        h: ``[B, H]``, written.
        kept: ``[B, K]``, written: the kept units of ``h``.
        slots: ``[H]``, int32: column of ``kept`` that a unit goes to, or below 0; None if all are kept.
    """
    hidden = c.shape[1]
    return Launch(
        forward_step,
        lambda _: (c.shape[0], triton.cdiv(c.shape[1], _BLOCK)),
        {
            "gates": gates, "acts": acts, "c": c, "c_next": c_next, "h": h, "kept": kept, "slots": slots,
            "H": hidden, "K": kept.shape[1], "gates_stride": gates.stride(0),
        },
        {"BLOCK": _BLOCK},
        _OPTIONS,
    )  # fmt: skip


def backward_launch(
    acts: Tensor, c: Tensor, c_next: Tensor, dh: Tensor, dh_kept: Tensor, slots: Tensor | None, dc: Tensor,
    dgates: Tensor,
) -> Launch:  # fmt: skip
    """One step backward.

    Args:
        acts: ``[B, 4 * H]``: ``i, f, g, o``.
        c: ``[B, H]``, cell state before the step.
        c_next: ``[B, H]``, after it.
        dh: ``[B, H]``, gradient of the output; rows may lie apart.
        dh_kept: ``[B, K]``, gradient of the kept units, from the step after.
        slots: As in :func:`forward_launch`.
        dc: ``[B, H]``, float32, gradient of ``c_next``; becomes that of ``c``.
        dgates: ``[B, 4 * H]``, written.
    """
    return Launch(
        backward_step,
        lambda _: (c.shape[0], triton.cdiv(c.shape[1], _BLOCK)),
        {
            "acts": acts, "c": c, "c_next": c_next, "dh": dh, "dh_kept": dh_kept, "slots": slots, "dc": dc,
            "dgates": dgates, "H": c.shape[1], "K": dh_kept.shape[1], "dh_stride": dh.stride(0),
        },
        {"BLOCK": _BLOCK},
        _OPTIONS,
    )  # fmt: skip


def specimens() -> list[Specimen]:
    """What is compiled ahead of time: a step each way, with and without a recurrent pattern."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        wide, state, kept = (torch.empty(20, n, dtype=dtype, device="meta") for n in (6400, 1600, 800))
        slots = torch.empty(1600, dtype=torch.int32, device="meta")
        for name, units, places in (("", state, None), ("_kept", kept, slots)):
            forward = forward_launch(wide, wide, state, state, state, units, places)
            backward = backward_launch(wide, state, state, state, units, places, state.float(), wide)
            found += specimens_of(f"lstm_forward{name}", forward) + specimens_of(f"lstm_backward{name}", backward)
    return found
