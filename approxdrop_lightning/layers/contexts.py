"""Contexts of deferred work: no compiler, and the saved-tensor hooks and the autocast of the original call."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from approxdrop_lightning.graph.frames import never_alone

_Function = TypeVar("_Function", bound=Callable[..., Any])


def run_eagerly(function: _Function) -> _Function:
    """Let a function run eagerly under ``torch.compile``: a visible graph break.

    Tracing would make constants of the patterns, hence a new graph for each until the limit, and then silence.
    """
    disabled = torch.compiler.disable(function, reason="patterns change with every batch")

    @functools.wraps(function)
    @never_alone
    def call(*args: Any, **kwargs: Any) -> Any:
        # Where no compiler is about, its detour of some microseconds is saved.
        if torch.compiler.is_dynamo_compiling() or get_eval_frame_callback() is not None:
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]  # of the same signature


def saving_hooks() -> Any:
    """Who packs the tensors that autograd saves at this point; None: nobody."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def saving_as_where(hooks: Any) -> contextlib.AbstractContextManager[None]:
    """Save past hooks that were not there when what is computed now was called for.

    Non-reentrant checkpointing counts what is saved between the ends of a segment, and must find the same when it
    computes the segment again: what began to wait before the segment is none of its.
    """
    if saving_hooks() == hooks:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_identity, _identity)


def _identity(x: Any) -> Any:
    return x


class Autocast:
    """The state of ``torch.autocast`` for a device, as it is when this is made."""

    __slots__ = ("dtype", "enabled", "kind")

    def __init__(self, kind: str) -> None:
        self.kind, self.dtype, self.enabled = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    @property
    def is_current(self) -> bool:
        """Whether it is so still, or again."""
        return (torch.get_autocast_dtype(self.kind), torch.is_autocast_enabled(self.kind)) == (
            self.dtype,
            self.enabled,
        )

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """For the duration it is so again."""
        return contextlib.nullcontext() if self.is_current else torch.autocast(self.kind, self.dtype, self.enabled)
