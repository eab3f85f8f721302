"""Functional dropouts of one model: which calls are its own, and their sites."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import nn

if TYPE_CHECKING:
    from approxdrop_lightning.layers.site import Site


class Owner(Protocol):
    """What the calls of a model need of its conversion."""

    @property
    def in_step(self) -> bool:
        """Whether a training step is under way."""

    def draw(self) -> None:
        """Draw patterns in the next steps."""

    def site_of_call(self, name: str, rate: float) -> Site | str:
        """A new site for a functional dropout, or the reason why there is none."""


class Calls:
    """The functional dropouts of one model.

    Args:
        model: The model. Only weak references to its modules are held.
        owner: Its conversion, held weakly, too.
        left: Reports a dropout of a graph that stays as it is: called with its name, rate and reason.

    Attributes:
        names: Names of all modules by ``id``, as in Dynamo's ``nn_module_stack``.
    """

    def __init__(self, model: nn.Module, owner: Owner, left: Callable[[str, float | None, str], None]) -> None:
        self.left = left
        modules = dict(model.named_modules())
        self.names = {str(id(module)): name for name, module in modules.items()}
        self._modules = {str(id(module)): weakref.ref(module) for module in modules.values()}
        self._owner = weakref.ref(owner)
        self._sites: dict[tuple[str, float], Site | str] = {}
        self._closed = False

    def module(self, key: str) -> nn.Module | None:
        """The module of an ``id``; None if it is none of the model's, or the conversion has ended."""
        ref = None if self.is_closed else self._modules.get(key)
        return None if ref is None else ref()

    @property
    def is_closed(self) -> bool:
        """Whether the conversion has ended."""
        return self._closed or self._owner() is None

    def close(self) -> None:
        """End the conversion."""
        self._closed = True

    def are_drawn(self, module: nn.Module | None) -> bool:
        """Whether patterns are drawn at the moment for calls in the code of a module; None: in other code."""
        owner = None if self._closed else self._owner()
        return owner is not None and owner.in_step and (module is None or module.training)

    def draw(self) -> None:
        """Draw patterns in the next steps, because a graph reads them."""
        if (owner := self._owner()) is not None:
            owner.draw()

    def site(self, name: str, rate: float) -> Site | str:
        """The site of a call, or the reason why there is none."""
        owner = self._owner()
        assert owner is not None
        if (name, rate) not in self._sites:
            self._sites[name, rate] = owner.site_of_call(name, rate)
        return self._sites[name, rate]
