"""Frames that Dynamo must not capture on their own, because converted layers would not work together.

Dynamo does not capture calls of ``nn.LSTM``. It breaks the graph there, or skips the function that contains the call,
and then captures the functions that are called from it, except for those of PyTorch's own layers.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any, TypeVar

from torch import nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

_Function = TypeVar("_Function", bound=Callable[..., Any])
_SKIP = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT)
_CAPTURE = _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.DEFAULT)


def never_alone(function: _Function) -> _Function:
    """Capture a function only as part of its caller: a graph of a single layer saves nothing."""
    set_code_exec_strategy(function.__code__, _SKIP)
    return function


class Callers:
    """Functions of a model that call its LSTMs, which Dynamo does not capture.

    If a graph ended at the LSTM, the dropouts in it would have no consumer. So such a function runs eagerly in
    training; the functions that it calls are captured.

    Args:
        model: The model.
        layers: Its LSTMs.
    """

    #: Which models make a function run eagerly.
    _HOLDERS: dict[CodeType, weakref.WeakSet[Callers]] = {}

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        self._codes = {code for layer in layers for code in _callers(model, layer)}
        for code in self._codes:
            self._HOLDERS.setdefault(code, weakref.WeakSet())
        weakref.finalize(self, _release, self._codes)

    def begin(self) -> None:
        """Begin a training step: run the functions eagerly."""
        for code in self._codes:
            self._HOLDERS[code].add(self)
            set_code_exec_strategy(code, _SKIP)

    def end(self) -> None:
        """Capture the functions again: the model is evaluated or restored."""
        for code in self._codes:
            self._HOLDERS[code].discard(self)
        _release(self._codes)


def _release(codes: set[CodeType]) -> None:
    for code in codes:
        if not Callers._HOLDERS[code]:
            set_code_exec_strategy(code, _CAPTURE)


def _callers(model: nn.Module, layer: nn.Module) -> Iterator[CodeType]:
    """Methods that refer to a layer, or to the container it is in, by name."""
    for owner in model.modules():
        for name, child in owner.named_children():
            if child is not layer:
                continue
            if _is_stock(type(owner)):
                yield from _callers(model, owner)
            else:
                yield from _methods(type(owner), name)


def _methods(cls: type, name: str) -> set[CodeType]:
    """Methods of a class that refer to an attribute by name, and the methods that refer to them."""
    codes = [
        function.__code__
        for base in cls.__mro__
        if not _is_stock(base)
        for function in vars(base).values()
        if inspect.isfunction(function)
    ]
    names, found = {name}, set[CodeType]()
    while more := {code for code in codes if names & set(code.co_names)} - found:
        found |= more
        names |= {code.co_name for code in more}
    return found


def _is_stock(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("torch", "lightning", "pytorch_lightning")
