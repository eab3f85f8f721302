"""Counting the multiplies of stock layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.callback import callback_handler

_COUNTED = (nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.Linear)


def multiplies(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Multiplies of one forward call of a stock layer, without elementwise operations.

    Args:
        module: A convolution, attention, recurrent or linear layer; other layers count as 0.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: Its return value.

    Returns:
        The number of multiplies.
    """
    if isinstance(module, nn.MultiheadAttention):
        query, key, value = (args + tuple(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3]
        width, rows = module.embed_dim, query.numel() // query.shape[-1]
        length = key.shape[1 if module.batch_first and key.dim() == 3 else 0]
        return 2 * rows * width**2 + (key.numel() + value.numel()) * width + 2 * rows * length * width
    x = args[0] if args else kwargs["input"]
    x = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
    if isinstance(module, nn.modules.conv._ConvNd):
        entries = x.numel() * module.out_channels if module.transposed else output.numel() * module.in_channels
        return entries // module.groups * math.prod(module.kernel_size)
    rows = x.numel() // x.shape[-1]
    if isinstance(module, nn.RNNBase):
        return rows * sum(p.numel() for name, p in module.named_parameters() if p.dim() == 2)
    return rows * module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


class Count:
    """Counts the multiplies of stock layers during one training step, with forward hooks.

    Remove them with :meth:`stop` after the step, because hooks disable fast paths of some PyTorch layers. They are
    also removed when Dynamo starts compiling, since it would guard on them; the graph pass counts layers by itself.

    Args:
        modules: Layers to count; other kinds of layers are ignored.
        note: Called with the multiplies of each training forward.
    """

    def __init__(self, modules: list[nn.Module], note: Callable[[int], None]) -> None:
        self._note = note
        self._handles = [
            module.register_forward_hook(self._hook, with_kwargs=True)
            for module in modules
            if isinstance(module, _COUNTED)
        ]
        callback_handler.register_start_callback(self._remove)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._note(multiplies(module, args, kwargs, output))

    def stop(self) -> None:
        """Remove the hooks."""
        with contextlib.suppress(ValueError):  # torch.compiler.reset() has removed it
            callback_handler.remove_start_callback(self._remove)
        self._remove()

    def _remove(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
