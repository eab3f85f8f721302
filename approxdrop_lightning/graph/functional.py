"""Dropouts of a graph that are function calls rather than layers of the model, for the report."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.fx import Node

from approxdrop_lightning.graph.rules.rule import argument, overloads

_DROPOUT = overloads("dropout", "dropout_")
_ATTENTION = F.scaled_dot_product_attention
_TORCH = str(Path(torch.__file__).parent)


def functional_dropout(node: Node) -> tuple[float, str, str] | None:
    """Rate, ``"file:line"`` and reason why it stays as it is, for a functional dropout; None for other nodes.

    Calls from PyTorch's own modules are left out: the report has rows for these modules.
    """
    if node.op != "call_function" or not (node.target in _DROPOUT or node.target is _ATTENTION):
        return None
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    if modules and modules[-1][1].__module__.startswith(("torch.", "approxdrop_lightning.")):
        return None
    if node.target is _ATTENTION:
        rate, reason = argument(node, 4, "dropout_p", 0.0), "dropout inside attention is left as it is"
    else:
        rate = argument(node, 1, "p", 0.5) if argument(node, 2, "training", True) else 0.0
        reason = "a function call; nn.Dropout in its place would be found"
    return (rate, _place(node), reason) if isinstance(rate, (int, float)) and rate > 0 else None


def _place(node: Node) -> str:
    calls = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in calls if not file.startswith(_TORCH)]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else "?"
