"""Triton kernels for the pointwise part of an LSTM step, forward and backward; products use the vendor's library.

A step is one product and one launch. The forward launch also writes the kept units of ``h``, which the next step
multiplies, and the backward launch reads their gradient; ``slots`` gives the position of each unit among them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from approxdrop_lightning.ops.triton.common import Specimen, specimens_of
from approxdrop_lightning.ops.triton.launch import Launch

_BLOCK = 256  # small blocks, since a few rows of some hundred units have to occupy many SMs
_OPTIONS = {"num_warps": 2, "num_stages": 3}


@triton.jit
def _tanh(x):
    # The absolute error is one rounding of 1, even near 0. libdevice's tanh is better but missing in the interpreter.
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _load(pointer, live):
    return tl.load(pointer, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _slot(slots, unit, live):
    """Position of units among the kept ones; negative if dropped."""
    if slots is None:
        slot = unit
    else:
        slot = tl.load(slots + unit, mask=live, other=-1)
    return slot


@triton.jit
def forward_step(gates, acts, c, c_next, h, kept, slots, H, K, gates_stride, BLOCK: tl.constexpr):
    """Activations, cell state and output, from the gates' input part and their recurrent part, passed in ``acts``."""
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
    """Gradients of the pre-activation gates; ``dc`` becomes that of the previous step.

    The gradient of ``h`` is the sum of ``dh``, from the output, and ``dh_kept``, from the next step.
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
    """Launch of a forward step.

    Args:
        gates: ``[B, 4 * H]``, input part; rows may be strided.
        acts: ``[B, 4 * H]``, recurrent part; overwritten by ``i, f, g, o``.
        c: ``[B, H]``.
        c_next: ``[B, H]``, written.
        h: ``[B, H]``, written.
        kept: ``[B, K]``, written: the kept units of ``h``.
        slots: ``[H]``, int32: column of each unit in ``kept``, negative if dropped; None if all are kept.
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
    """Launch of a backward step.

    Args:
        acts: ``[B, 4 * H]``: ``i, f, g, o``.
        c: ``[B, H]``, cell state before the step.
        c_next: ``[B, H]``, cell state after the step.
        dh: ``[B, H]``, gradient of the output; rows may be strided.
        dh_kept: ``[B, K]``, gradient of the kept units, from the next step.
        slots: See :func:`forward_launch`.
        dc: ``[B, H]``, float32, gradient of ``c_next``; overwritten by that of ``c``.
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
    """Specimens for ahead-of-time compilation: forward and backward, with and without a recurrent pattern."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        wide, state, kept = (torch.empty(20, n, dtype=dtype, device="meta") for n in (6400, 1600, 800))
        slots = torch.empty(1600, dtype=torch.int32, device="meta")
        for name, units, places in (("", state, None), ("_kept", kept, slots)):
            forward = forward_launch(wide, wide, state, state, state, units, places)
            backward = backward_launch(wide, state, state, state, units, places, state.float(), wide)
            found += specimens_of(f"lstm_forward{name}", forward) + specimens_of(f"lstm_backward{name}", backward)
    return found
