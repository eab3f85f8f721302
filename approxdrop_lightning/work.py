"""Ledger of the multiplies of a converted layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from approxdrop_lightning.layers.site import Site


#: The site before a product and the one after it.
Sites = tuple["Site | None", "Site | None"]


class Ledger(dict[Sites, int]):
    """Dense multiplies of one layer in the last step, by ``(site before, site after)``.

    Steps that drop nothing are not recorded, because they do not show the sites.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stale = False
        #: Whether products are not recorded in this step.
        self.is_closed = False
        #: Number of products of each entry.
        self.calls: dict[Sites, int] = {}

    def begin(self, open_: bool) -> None:
        """Start a step; the last entries stay until a product is recorded."""
        self._stale, self.is_closed = True, not open_

    def note(self, before: Site | None, after: Site | None, multiplies: int) -> None:
        """Record a product, unless activation checkpointing recomputes it in a backward pass."""
        if self.is_closed or torch._C._current_graph_task_id() != -1:
            return
        if self._stale:
            self.clear()
            self.calls.clear()
            self._stale = False
        sites = before, after
        self[sites] = self.get(sites, 0) + multiplies
        self.calls[sites] = self.calls.get(sites, 0) + 1

    def forget(self, stock: set[Site]) -> None:
        """Take sites out of the record by which nothing is skipped after all."""
        for sites in list(self):
            before, after = (None if site in stock else site for site in sites)
            if (before, after) != sites:
                multiplies, calls = self.pop(sites), self.calls.pop(sites)
                self[before, after] = self.get((before, after), 0) + multiplies
                self.calls[before, after] = self.calls.get((before, after), 0) + calls

    def forget_outputs(self) -> None:
        """Take the products out whose kept units were computed beside the whole output."""
        for sites in [sites for sites in self if sites[1] is not None]:
            del self[sites], self.calls[sites]
