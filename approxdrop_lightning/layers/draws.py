"""What a dropout has drawn in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

#: Draws that are held at most.
_MOST_HELD = 1024

_Draw = TypeVar("_Draw")


class Draws(Generic[_Draw]):
    """One draw for each use of a dropout in a forward pass, in order; kept until the next pass begins.

    Args:
        name: Name of the dropout, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._draws: list[_Draw] = []
        #: Uses so far, and of these the first ones whose draws are no longer held.
        self._uses = self._forgotten = 0

    @property
    def uses(self) -> int:
        """Number of uses in this pass."""
        return self._uses

    def used(self) -> tuple[_Draw, ...]:
        """The draws of this pass that are held still."""
        return tuple(self._draws[: self._uses - self._forgotten])

    def begin(self, fresh: bool = True) -> None:
        """Begin a forward pass: with fresh draws, or with those of the last one again."""
        if fresh or self._forgotten:
            self._draws.clear()
        self._uses = self._forgotten = 0

    def next(self, draw: Callable[[], _Draw], fits: Callable[[_Draw], bool]) -> _Draw:
        """The draw of the next use: a new one, or that of the last pass if this repeats it and it still fits.

        Raises:
            RuntimeError: Activation checkpointing recomputes one of several uses; which one cannot be told.
        """
        if torch._C._current_graph_task_id() != -1:  # within a backward pass: activations are computed again
            if self._uses != 1:
                raise RuntimeError(
                    f"{self._name}: activation checkpointing recomputes a dropout that was used {self._uses} times "
                    "in this forward; which pattern is meant cannot be told"
                )
            return self._draws[0]
        place = self._uses - self._forgotten
        if place == len(self._draws) or not fits(self._draws[place]):
            del self._draws[place:]
            if place == _MOST_HELD:
                del self._draws[: place // 2]
                self._forgotten += place // 2
            self._draws.append(draw())
        self._uses += 1
        return self._draws[self._uses - self._forgotten - 1]
