"""Calls of functional dropout in the code of a model. Eager mode cannot replace them, so the report lists them."""

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
#: Those that compiled graphs find.
_DROPOUT = (torch.nn.functional.dropout, torch.dropout, torch.dropout_)
_KINDS = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout",
)  # fmt: skip
_FUNCTIONS = {
    getattr(home, name)
    for home in (torch, torch.nn.functional)
    for kind in _KINDS
    for name in (kind, f"{kind}_", f"native_{kind}")
    if hasattr(home, name)
}

#: Why a call is left as it is.
CALL = "a function call, which skips only in graphs of torch.compile (inductor); nn.Dropout would be found"
_ATTENTION_REASON = "dropout inside attention is left as it is"
OTHER = "a function call; nn.Dropout in its place would be found"


def functional_dropouts(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Find calls such as ``F.dropout(x)``, or attention with a ``dropout_p``, in the classes of a model's modules.

    They are found in the source code, before anything runs. Classes without source code, and functions called by the
    classes, are not searched.

    Args:
        model: The model. PyTorch's own classes are not searched.

    Yields:
        Name of the first module of the class, ``"file:line"`` of the call, and why it is left as it is.
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
        except (OSError, TypeError, SyntaxError):  # no source code, as for a deleted cell of a notebook
            continue
        scope = vars(sys.modules.get(cls.__module__, object()))
        file = (inspect.getsourcefile(cls) or "?").rsplit("/", 1)[-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _drops(node, function := _resolve(node.func, scope)):
                reason = CALL if function in _DROPOUT else _ATTENTION_REASON if function is _ATTENTION else OTHER
                yield name, f"{file}:{first + node.lineno - 1}", reason


def _drops(call: ast.Call, function: Any) -> bool:
    """Whether a call is one of a dropout function, or of attention with a dropout rate."""
    if function is _ATTENTION:
        rates = [k.value for k in call.keywords if k.arg == "dropout_p"] + call.args[4:5]
        return any(not (isinstance(rate, ast.Constant) and not rate.value) for rate in rates)
    return function in _FUNCTIONS


def _resolve(node: ast.expr, scope: dict[str, Any]) -> Any:
    """The module or function that a dotted name refers to; None if unknown. Only names are evaluated."""
    if isinstance(node, ast.Name):
        found = scope.get(node.id)
        return found if isinstance(found, ModuleType) or inspect.isroutine(found) else None
    if isinstance(node, ast.Attribute):
        home = _resolve(node.value, scope)
        return getattr(home, node.attr, None) if isinstance(home, ModuleType) else None
    return None
