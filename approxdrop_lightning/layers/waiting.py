"""Deferred values are computed before the tensors that they depend on change.

An optimizer step, the gradient of a weight and the end of a training step all announce a change.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle, unserializable_hook

if TYPE_CHECKING:
    from approxdrop_lightning.layers.lazy_tensor import LazyTensor

#: Lazy tensors whose values a change elsewhere might change, as long as somebody holds them.
_waiting: list[weakref.ref[LazyTensor]] = []
#: Hook on the steps of all optimizers, from the first tensor that waits on.
_optimizers: RemovableHandle | None = None
#: Weights whose gradients have a hook, by id; a backward pass need not meet any node of a lazy tensor.
_weights: dict[int, tuple[weakref.ref[Tensor], RemovableHandle]] = {}
_passes = 0
_last_pass = -1
_MANY = 4096


def settle() -> None:
    """Compute the values that are still waiting and that somebody holds: parameters are about to change.

    Called when a backward pass begins, or computes the gradient of a weight, and when a step ends. Most often nobody
    holds any.
    """
    global _waiting, _passes, _last_pass
    backward_pass = torch._C._current_graph_task_id()
    if backward_pass not in (-1, _last_pass):
        _passes, _last_pass = _passes + 1, backward_pass
    if not _waiting:
        return
    refs, _waiting = _waiting, []
    for ref in refs:
        tensor = ref()
        if tensor is not None and tensor.is_lazy and tensor.held.may_change and not tensor.held.has_changed:
            tensor.dense()


def _before_update(*_: Any) -> None:
    """A hook by which an optimizer that updates ``p.data``, which nothing tracks, finds nothing waiting."""
    if not torch.compiler.is_compiling():
        settle()


def watch_gradient(parameter: Tensor | None) -> None:
    """Let a backward pass that computes the gradient of a parameter compute the values that are still waiting.

    An update of the parameter comes next, and nothing else tells when: what waits may be no part of that pass.
    """
    if parameter is None or not parameter.requires_grad or not parameter.is_leaf:
        return
    key = id(parameter)
    known = _weights.get(key)
    if known is None or known[0]() is not parameter:
        _weights[key] = (
            weakref.ref(parameter, lambda _: _weights.pop(key, None)),
            parameter.register_hook(note_backward),
        )


def remove_hooks() -> None:
    """Remove the hooks on optimizers and weights: nothing waits in the steps to come, or they will be set again.

    Not after each step: compiled steps of optimizers are compiled anew if it changes.
    """
    global _optimizers
    if _optimizers is not None:
        _optimizers.remove()
        _optimizers = None
    while _weights:
        _weights.popitem()[1][1].remove()


def backward_passes() -> int:
    """How many backward passes have gone by a site so far."""
    return _passes


@unserializable_hook  # type: ignore[untyped-decorator]  # parameters with it are pickled without a warning
def note_backward(grad: Tensor) -> None:
    """A hook by which those notice a backward pass that have no node in it."""
    settle()


def wait(ref: weakref.ref[LazyTensor]) -> None:
    """Compute the values of a lazy tensor, if somebody still holds it, before a change."""
    global _waiting, _optimizers
    if len(_waiting) > _MANY:  # no backward pass, no step: somebody only evaluates
        _waiting = [ref for ref in _waiting if ref() is not None]
    if _optimizers is None:
        _optimizers = register_optimizer_step_pre_hook(_before_update)
    _waiting.append(ref)
