"""Calls of functional dropout in a model's own code: nothing can replace them, so the report names them."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_FUNCTIONS = {
    getattr(home, name)
    for home in (torch, torch.nn.functional)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    if hasattr(home, name)
}


def functional_dropouts(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Find calls such as ``F.dropout(x)``, or attention with a ``dropout_p``, in the classes of a model's modules.

    Read from the source, so a call is found before anything runs; code without source, and functions that
    the classes call, are not looked into.

    Args:
        model: The model. Classes of PyTorch itself are left out.

    Yields:
        Name of the module (the first one of its class), ``"file:line"`` of the call, and why it is left as it is.
    """
    seen: set[type] = set()
    for name, module in model.named_modules():
        cls = type(module)
        if cls in seen or cls.__module__.split(".")[0] in ("torch", "lightning", "approxdrop_lightning"):
            continue
        seen.add(cls)
        try:
            lines, first = inspect.getsourcelines(cls)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, TypeError, SyntaxError):  # no source, as in a notebook's deleted cell
            continue
        scope = vars(sys.modules.get(cls.__module__, object()))
        file = (inspect.getsourcefile(cls) or "?").rsplit("/", 1)[-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _drops(node, _resolve(node.func, scope)):
                attention = _resolve(node.func, scope) is _ATTENTION
                reason = (
                    "dropout inside attention is left as it is"
                    if attention
                    else "a function call; nn.Dropout in its place would be found"
                )
                yield name, f"{file}:{first + node.lineno - 1}", reason


def _drops(call: ast.Call, function: Any) -> bool:
    """Whether a call is one of dropout, or of attention with a rate of dropout."""
    if function is _ATTENTION:
        rates = [k.value for k in call.keywords if k.arg == "dropout_p"] + call.args[4:5]
        return any(not (isinstance(rate, ast.Constant) and not rate.value) for rate in rates)
    return function in _FUNCTIONS


def _resolve(node: ast.expr, scope: dict[str, Any]) -> Any:
    """What a dotted name means in a module; None if it cannot be told. Nothing is evaluated but names."""
    if isinstance(node, ast.Name):
        found = scope.get(node.id)
        return found if isinstance(found, ModuleType) or inspect.isroutine(found) else None
    if isinstance(node, ast.Attribute):
        home = _resolve(node.value, scope)
        return getattr(home, node.attr, None) if isinstance(home, ModuleType) else None
    return None
