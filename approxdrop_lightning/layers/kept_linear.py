"""Linear layers before and after a dropout, each a single node of the graph that holds kept values only.

Each node has two ways back. Gradients take the packed one, to the kept values that the layer has read. If somebody
wants the gradient of a lazy tensor that was bypassed, or derivatives of the gradients, they take the dense one,
through that tensor. Everything else (other backends, ``torch.autocast``, other activations) is composed of functions
that do the same in several nodes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning import functional
from approxdrop_lightning.layers.kept import Packing, unpacked
from approxdrop_lightning.layers.lazy_tensor import LazyTensor
from approxdrop_lightning.layers.waiting import settle
from approxdrop_lightning.ops.backend import choose_backend
from approxdrop_lightning.ops.derivative import must_be_differentiable, vjp
from approxdrop_lightning.ops.row_linear.groups import GroupedLinear


def is_one_node(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> bool:
    """Whether the compact backend computes a layer of these operands as they are, without casts or errors."""
    kind = x.dtype, x.device
    return (
        weight.dim() == 2
        and (weight.dtype, weight.device) == kind
        and (bias is None or (bias.shape, bias.dtype, bias.device) == (weight.shape[:1], *kind))
        and not torch.is_autocast_enabled(x.device.type)
        and x.is_floating_point()
        and choose_backend(backend) == "compact"
    )


def _together(dense: Tensor | None, grad: Tensor | None, packing: Packing) -> Tensor | None:
    """Gradient of kept values: that of the dropped-out tensor, read whole, and that of the values themselves."""
    if dense is None:
        return grad
    packed = functional.pack(dense, packing[0], "reference")
    return packed if grad is None else grad + packed.view(grad.shape)


class KeptLinear(torch.autograd.Function):
    """The layer before a dropout, its activation and the dropout: the dropped-out tensor, and its kept values."""

    @staticmethod
    def forward(
        ctx: Any,
        cls: type[Tensor],
        layer: GroupedLinear,
        activation: str,
        scale: float,
        packing: Packing,
        source: LazyTensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        values = layer.product(x, weight, bias, activation == "relu", scale)
        ctx.layer, ctx.activation, ctx.scale = layer, activation, scale
        ctx.packing, ctx.source = packing, source.place
        ctx.save_for_backward(x, weight, values)
        shown = torch.Tensor._make_wrapper_subclass(cls, packing[2], dtype=values.dtype, device=values.device)
        return shown, values

    @staticmethod
    def backward(ctx: Any, dense: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        settle()
        grad = _together(dense, grad, ctx.packing)
        if grad is None:
            return (None,) * 9
        if must_be_differentiable(grad) or ctx.source.is_wanted:
            return None, None, None, None, None, unpacked(grad * ctx.scale, ctx.packing), None, None, None
        x, weight, values = ctx.saved_tensors
        y = values if ctx.activation == "relu" else None
        gradients = ctx.layer.gradients(grad, x, weight, ctx.needs_input_grad[6:], y, ctx.scale)
        return None, None, None, None, None, None, *gradients


class KeptInputs(torch.autograd.Function):
    """A layer that reads a dropped-out tensor, and computes all outputs of its kept values."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: GroupedLinear,
        packing: Packing,
        source: LazyTensor,
        values: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.packing, ctx.source = layer, packing, source.place
        ctx.save_for_backward(values, weight, bias)
        return layer.product(values, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        values, weight, bias = ctx.saved_tensors
        if not (must_be_differentiable(grad) or ctx.source.is_wanted):
            return None, None, None, *ctx.layer.gradients(grad, values, weight, ctx.needs_input_grad[3:])

        def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight, bias).view(grad.shape)

        wanted = ctx.needs_input_grad[2], *ctx.needs_input_grad[4:]
        dx, dw, db = vjp(dense, (unpacked(values, ctx.packing), weight, bias), wanted, grad)
        return None, None, dx, None, dw, db


class Keep(torch.autograd.Function):
    """The dropout alone: a dropped-out tensor and its values, of the kept values of a pending output.

    Gradients go back to the values; where somebody wants that of the pending output, or derivatives of them, to that.
    """

    @staticmethod
    def forward(
        ctx: Any, cls: type, packing: Packing, scale: float, values: Tensor, source: LazyTensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.packing, ctx.scale, ctx.source = packing, scale, source.place
        shown: Tensor = torch.Tensor._make_wrapper_subclass(cls, packing[2], dtype=values.dtype, device=values.device)
        return shown, values * scale

    @staticmethod
    def backward(ctx: Any, dense: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        settle()
        grad = _together(dense, grad, ctx.packing)
        if grad is None:
            return None, None, None, None, None
        grad = grad * ctx.scale
        if must_be_differentiable(grad) or ctx.source.is_wanted:
            return None, None, None, None, unpacked(grad, ctx.packing)
        return None, None, None, grad, None
