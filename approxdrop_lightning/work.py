"""Ledger of the multiplies of a converted layer."""

from __future__ import annotations

from typing import Any

import torch


class Ledger(dict[tuple[Any, Any], int]):
    """Multiplies of the dense products of one layer in the last step: ``(site before, site after)`` to number.

    A step that drops nothing shows no sites, so it is not noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stale = self._closed = False

    def begin(self, open_: bool) -> None:
        """Begin a step; what is known stays until something is noted."""
        self._stale, self._closed = True, not open_

    def note(self, before: Any, after: Any, multiplies: int) -> None:
        """Add a product. Activations that a backward pass computes again are not counted twice."""
        if self._closed or torch._C._current_graph_task_id() != -1:
            return
        if self._stale:
            self.clear()
            self._stale = False
        self[before, after] = self.get((before, after), 0) + multiplies
