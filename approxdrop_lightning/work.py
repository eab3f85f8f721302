"""Ledger of the multiplies of a converted layer."""

from __future__ import annotations

from typing import Any

import torch


class Ledger(dict[tuple[Any, Any], int]):
    """Dense multiplies of one layer in the last step, by ``(site before, site after)``.

    Steps that drop nothing are not recorded, because they do not show the sites.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stale = self._closed = False
        #: Number of products of each entry.
        self.calls: dict[tuple[Any, Any], int] = {}

    def begin(self, open_: bool) -> None:
        """Start a step; the last entries stay until a product is recorded."""
        self._stale, self._closed = True, not open_

    def note(self, before: Any, after: Any, multiplies: int) -> None:
        """Record a product, unless activation checkpointing recomputes it in a backward pass."""
        if self._closed or torch._C._current_graph_task_id() != -1:
            return
        if self._stale:
            self.clear()
            self.calls.clear()
            self._stale = False
        sites = before, after
        self[sites] = self.get(sites, 0) + multiplies
        self.calls[sites] = self.calls.get(sites, 0) + 1
