"""The LSTM recurrence with Triton kernels as two PyTorch operators: the whole sequence, and its backward.

They do not synchronize, and output shapes depend on input shapes only, so both can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from approxdrop_lightning.ops.custom_op import Shape, custom_op
from approxdrop_lightning.ops.lstm.triton_lstm import backward_launch, forward_launch
from approxdrop_lightning.ops.triton.common import check_operands


@custom_op("approxdrop::lstm_sequence")
def _sequence(
    gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``h, h_T, c_T``; and for the backward the activations, cell states and recurrent inputs."""
    h, _, _, acts, c, inputs = _results(gates, h0, c0, weight, kept)
    slots = _slots(kept, h0)
    c[0] = c0
    inputs[0] = h0 if kept is None else h0.index_select(1, kept)
    transposed = weight.t()
    steps = zip(*(t.unbind(0) for t in (_rows(gates), acts, c, c[1:], h, inputs, inputs[1:])), strict=False)
    for gates_t, acts_t, c_t, c_next, h_t, inputs_t, inputs_next in steps:
        torch.mm(inputs_t, transposed, out=acts_t)
        forward_launch(gates_t, acts_t, c_t, c_next, h_t, inputs_next, slots).run()
    return h, h[-1].clone(), c[-1].clone(), acts, c, inputs


@_sequence.register_fake
def _results(
    gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps, batch, hidden = gates.shape[0], gates.shape[1], gates.shape[2] // 4
    new = gates.new_empty
    return (
        new(steps, batch, hidden), new(batch, hidden), new(batch, hidden),
        new(gates.shape), new(steps + 1, batch, hidden), new(steps + 1, batch, weight.shape[1]),
    )  # fmt: skip


@custom_op("approxdrop::lstm_sequence_backward")
def _sequence_backward(
    dh: Tensor | None, dh_last: Tensor | None, dc_last: Tensor | None, acts: Tensor, c: Tensor, weight: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``gates``, ``h0`` and ``c0``."""
    dgates = acts.new_empty(acts.shape)
    zeros = c.new_zeros(c.shape[1:])
    dh = zeros.expand_as(c[1:]) if dh is None else _rows(dh)
    dc = (zeros if dc_last is None else dc_last).to(torch.float32, copy=True)
    # The incoming gradient of the last output covers all units, those between steps only the kept ones.
    dh_kept, slots = (zeros if dh_last is None else dh_last.contiguous()), None
    recurrent, recurrent_slots = c.new_empty(c.shape[1], weight.shape[1]), _slots(kept, zeros)
    steps = reversed(list(zip(*(t.unbind(0) for t in (acts, c, c[1:], dh, dgates)), strict=False)))
    for acts_t, c_t, c_next, dh_t, dgates_t in steps:
        backward_launch(acts_t, c_t, c_next, dh_t, dh_kept, slots, dc, dgates_t).run()
        torch.mm(dgates_t, weight, out=recurrent)
        dh_kept, slots = recurrent, recurrent_slots
    dh0 = recurrent if kept is None else zeros.index_copy(1, kept, recurrent)
    return dgates, dh0, dc.to(c.dtype, copy=True)


@_sequence_backward.register_fake
def _(
    dh: Tensor | None, dh_last: Tensor | None, dc_last: Tensor | None, acts: Tensor, c: Tensor, weight: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return acts.new_empty(acts.shape), c.new_empty(c.shape[1:]), c.new_empty(c.shape[1:])


def _slots(kept: Tensor | None, state: Tensor) -> Tensor | None:
    """Position of each unit of a state among the kept ones, -1 if it is dropped; None if all are kept."""
    if kept is None:
        return None
    slots = torch.full((state.shape[1],), -1, dtype=torch.int32, device=state.device)
    return slots.scatter_(0, kept, torch.arange(len(kept), dtype=torch.int32, device=state.device))


def _rows(steps: Tensor) -> Tensor:
    """The tensor itself if its innermost dimension has unit stride, otherwise a copy."""
    return steps if steps.stride(-1) == 1 else steps.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, weight, kept = inputs
    _, _, _, acts, c, recurrent_inputs = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(acts, c, recurrent_inputs, weight, kept)


def _backward(
    ctx: Any, dh: Tensor | None, dh_last: Tensor | None, dc_last: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    acts, c, inputs, weight, kept = ctx.saved_tensors
    dgates, dh0, dc0 = _sequence_backward(dh, dh_last, dc_last, acts, c, weight, kept)
    dweight = None
    if ctx.needs_input_grad[3]:
        dweight = dgates.flatten(0, 1).t() @ inputs[:-1].flatten(0, 1)
    return dgates, dh0, dc0, dweight, None


_sequence.register_autograd(_backward, setup_context=_setup_context)
_sequence.register_autocast()


@register_flop_formula(torch.ops.approxdrop.lstm_sequence)
def _sequence_flops(
    gates_shape: Shape, h0_shape: Shape, c0_shape: Shape, weight_shape: Shape, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(gates_shape[:2]) * math.prod(weight_shape)


@register_flop_formula(torch.ops.approxdrop.lstm_sequence_backward)
def _backward_flops(
    dh_shape: Shape | None, dh_last_shape: Shape | None, dc_last_shape: Shape | None, acts_shape: Shape,
    c_shape: Shape, weight_shape: Shape, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return 2 * math.prod(acts_shape[:2]) * math.prod(weight_shape)


def sequence(
    gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`approxdrop_lightning.ops.lstm.sequence`.

    Raises:
        ValueError: The kernels do not support the type (float32, float16, bfloat16) or the device.
    """
    check_operands("lstm_sequence", gates, h0, c0, weight)
    return _sequence(gates, h0, c0, weight, kept)[:3]
