"""Functions that Dynamo makes no graph of, because layers of ours would not work together there.

Dynamo does not capture what reads an ``nn.LSTM``: it captures up to there, or nothing, and goes on with the functions
that are called, of which it lets those of PyTorch's own layers run.
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
    """Let a function of a layer be captured within another one only: a graph of a single layer saves nothing."""
    set_code_exec_strategy(function.__code__, _SKIP)
    return function


class Callers:
    """Functions of a model that call some of its layers, which Dynamo does not capture: its LSTMs.

    A dropout that is captured before the call has nobody to read its kept units alone. While training such a function
    runs eagerly, all of it; what other functions it calls is captured.

    Args:
        model: The model.
        layers: The layers.
    """

    #: Who lets a function run eagerly.
    _HOLDERS: dict[CodeType, weakref.WeakSet[Callers]] = {}

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        self._codes = {code for layer in layers for code in _callers(model, layer)}
        for code in self._codes:
            self._HOLDERS.setdefault(code, weakref.WeakSet())
        weakref.finalize(self, _release, self._codes)

    def begin(self) -> None:
        """A training step begins."""
        for code in self._codes:
            self._HOLDERS[code].add(self)
            set_code_exec_strategy(code, _SKIP)

    def end(self) -> None:
        """The model evaluates, or is the stock one."""
        for code in self._codes:
            self._HOLDERS[code].discard(self)
        _release(self._codes)


def _release(codes: set[CodeType]) -> None:
    for code in codes:
        if not Callers._HOLDERS[code]:
            set_code_exec_strategy(code, _CAPTURE)


def _callers(model: nn.Module, layer: nn.Module) -> Iterator[CodeType]:
    """Methods in which the name of a layer occurs, or that of the container which it is in."""
    for owner in model.modules():
        for name, child in owner.named_children():
            if child is not layer:
                continue
            if _is_stock(type(owner)):
                yield from _callers(model, owner)
            else:
                yield from _methods(type(owner), name)


def _methods(cls: type, name: str) -> set[CodeType]:
    """Methods of a class that use a name, and those that use their names."""
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
