"""Where tensors enter compiled parts of a model that is otherwise eager.

Layers that run eagerly hand on tensors that are computed when somebody reads them. A compiled part reads them all:
so they are computed before it begins, since Dynamo would break its graph at each of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import tree_map

from approxdrop_lightning.layers.lazy_tensor import LazyTensor, as_dense


class Entrances:
    """Watches the compiled parts of a model until :meth:`leave`.

    Args:
        model: The model. Parts are those made by ``torch.compile(module)`` and ``module.compile()``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._leave: list[Callable[[], Any]] = []
        for module in compiled_parts(model):
            if isinstance(module, OptimizedModule):
                self._leave.append(module.register_forward_pre_hook(_hook, with_kwargs=True).remove)
            elif (compiled := module._compiled_call_impl) is not None:
                module._compiled_call_impl = _entered(compiled)
                self._leave.append(partial(_put_back, weakref.ref(module), compiled))

    def leave(self) -> None:
        """Take off what was put on."""
        for leave in self._leave:
            leave()
        self._leave = []


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """The modules that ``torch.compile(module)`` has made, and those compiled by ``module.compile()``."""
    return [m for m in model.modules() if isinstance(m, OptimizedModule) or m._compiled_call_impl is not None]


def _put_back(ref: weakref.ref[nn.Module], compiled: Callable[..., Any]) -> None:
    if (module := ref()) is not None:
        module._compiled_call_impl = compiled


def _hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    return _dense(args, kwargs)


def _dense(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if any(isinstance(a, LazyTensor) for a in (*args, *kwargs.values())):
        return tree_map(as_dense, args), tree_map(as_dense, kwargs)
    return None


def _entered(compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        dense = _dense(args, kwargs)
        return compiled(*args, **kwargs) if dense is None else compiled(*dense[0], **dense[1])

    return call
