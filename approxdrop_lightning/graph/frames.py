"""Frames that Dynamo makes no graph of: a layer is a part of somebody's graph, or it runs eagerly.

Dynamo does not capture a function that reads an ``nn.LSTM``, and goes on with the functions that it calls. Those of
stock layers are PyTorch's own, which it lets run. A graph of a single layer of ours would save nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._dynamo.eval_frame import skip_code

_Function = TypeVar("_Function", bound=Callable[..., Any])


def never_alone(function: _Function) -> _Function:
    """Let a function be captured within another one only."""
    skip_code(function.__code__)
    return function
