"""Base of all converted layers: outside of training steps they are the stock layers."""

from __future__ import annotations

import copyreg
import weakref
from typing import Any, ClassVar

import torch
from torch import nn

from approxdrop_lightning.graph.frames import never_alone

#: Arguments of some instance of each stock class, which takes its state later: without memory and random numbers.
_ANY: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Dropout: (),
    nn.Linear: (1, 1, True, "meta"),
    nn.LSTM: (1, 1, 1, True, False, 0.0, False, 0, "meta"),
}

#: Modes under which tensors have no values, or under which operations are recorded.
_TRACING = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))
# Bound once, since every layer calls them in every step.
_jit_trace, _modes = torch._C._get_tracing_state, torch._C._len_torch_dispatch_stack

#: Classes of ours that are of a user's class, too.
_DERIVED: dict[tuple[type, type], type] = {}


class Converted:
    """A stock layer under another class, for as long as a conversion has it.

    A layer of which no conversion knows (any more) computes what the stock layer computes: one whose class somebody
    put back after the conversion had ended, or whose model is gone. Copies and pickles are stock layers: the patterns
    of a conversion are drawn for its own layers only. In evaluation mode the very class is the stock one, so that
    tools which look at classes find what they know; the next training step puts it back.
    """

    #: The class of PyTorch in whose place the layer stands.
    stock: ClassVar[type[nn.Module]]
    #: The layer and its conversion. Weak, so that nothing lives longer for it; the former tells a copy.
    owner: tuple[weakref.ref[Any], weakref.ref[Any]] | None = None

    @never_alone
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the stock layer."""
        if not isinstance(self, Converted):  # a bound method that outlived the conversion, in somebody's wrapper
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return self._captured(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes while it is converted, in eager mode."""
        raise NotImplementedError

    def _captured(self, *args: Any, **kwargs: Any) -> Any:
        """The same in code that Dynamo captures: unless a layer says otherwise, a visible graph break."""
        return self._run(*args, **kwargs)

    def _as_stock(self, *args: Any, **kwargs: Any) -> Any:
        """What the stock layer computes."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]  # the stock class comes next

    @property
    def is_live(self) -> bool:
        """Whether the layer is part of a conversion that has not ended."""
        return self.owner is not None and self.owner[0]() is self and self.owner[1]() is not None

    @property
    def drops(self) -> bool:
        """Whether it is in training mode and a step of its conversion is under way: else it is the stock layer."""
        if not self.__dict__["training"] or self.owner is None or self.owner[0]() is not self:
            return False
        if is_traced():
            return False
        conversion = self.owner[1]()
        return conversion is not None and conversion.stepping

    @property
    def training(self) -> bool:
        """As of every module."""
        return self.__dict__["training"]

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode
        if not mode:
            self._rest()

    def _rest(self) -> None:
        conversion = self.owner[1]() if self.owner is not None and self.is_live else None
        if conversion is not None:
            conversion.rest(self)

    def __prepare_scriptable__(self) -> Any:
        """Called by ``torch.jit.script``, which compiles the code of classes."""
        self._rest()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the stock layer, by which copies and pickles are made."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, state, *rest = reduced
        if isinstance(state, dict):
            ours = attributes(type(self))
            state = {name: value for name, value in state.items() if name not in ours}
        if "stock" in vars(type(self)):  # else it is a class of others' that derives from ours
            # Not by `__newobj__`, which picklers refuse for another class than the object's.
            known = self.stock in _ANY
            make, arguments = (
                (self.stock, _ANY[self.stock]) if known else (copyreg._reconstructor, (self.stock, object, None))  # type: ignore[attr-defined]
            )
        return (make, arguments, state, *rest)


def is_traced() -> bool:
    """Whether operations are traced (``torch.jit.trace``, ``make_fx``, ``torch.export``) or run on fake tensors.

    A pattern would become a constant of the trace, and fake tensors have no values to draw one from.
    """
    if _jit_trace() is not None:
        return True
    return bool(_modes()) and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACING)


def class_for(ours: type, stock: type[nn.Module]) -> type:
    """The class of a converted layer: ours, or one that is of a user's class, too.

    Args:
        ours: Class of this package, in the place of a class of PyTorch.
        stock: That class, or one derived from it that computes as it does.
    """
    if vars(ours)["stock"] is stock:
        return ours
    if (ours, stock) not in _DERIVED:
        _DERIVED[ours, stock] = type(ours.__name__, (ours, stock), {"stock": stock})
    return _DERIVED[ours, stock]


def attributes(cls: type) -> set[str]:
    """Names that conversion puts on layers of a class; a stock layer has none of them."""
    bases = (base for base in cls.__mro__ if issubclass(base, Converted))
    return {name for base in bases for name in vars(base).get("__annotations__", {})}


def give_back(layer: nn.Module | Converted) -> None:
    """Make a converted layer the stock one.

    If others have put a class of theirs in the place of ours since (as ``torch.nn.utils.parametrize`` does), theirs
    stays, and derives from the stock class from now on.

    Raises:
        TypeError: Python does not let that class have other bases. The layer computes as the stock one all the same.
    """
    cls = type(layer)
    if not issubclass(cls, Converted):
        return
    for name in attributes(cls):
        layer.__dict__.pop(name, None)
    if "stock" in vars(cls):
        layer.__class__ = cls.stock
        return
    for base in cls.__mro__:
        ours = [b for b in base.__bases__ if "stock" in vars(b) and issubclass(b, Converted)]
        if "stock" in vars(base) or not ours:
            continue
        base.__bases__ = tuple(b.stock if b in ours else b for b in base.__bases__)
        for b in ours:  # "ParametrizedApproxLinear"
            base.__name__ = base.__name__.replace(b.__name__, b.stock.__name__)
            base.__qualname__ = base.__qualname__.replace(b.__name__, b.stock.__name__)
