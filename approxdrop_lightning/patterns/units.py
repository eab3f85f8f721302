"""Some units of a layer, as runs of consecutive ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.device import to_device


@dataclass(frozen=True, eq=False)
class Units:
    """Some units of a layer, in an order, as runs of consecutive ones: what can be copied as a piece.

    Attributes:
        starts: First unit of each run, int64.
        lengths: Units of each run, int64.
        count: Units in all.
    """

    starts: Tensor
    lengths: Tensor
    count: int

    @cached_property
    def index(self) -> Tensor:
        """The units one by one, int64."""
        if len(self.starts) == self.count:  # runs of one
            return self.starts
        if self.count and bool((self.lengths == self.lengths[0]).all()):
            return (self.starts[:, None] + torch.arange(int(self.lengths[0]), device="cpu")).view(-1)
        shift = self.starts - self.lengths.cumsum(0) + self.lengths
        return shift.repeat_interleave(self.lengths, output_size=self.count) + torch.arange(self.count, device="cpu")

    @cached_property
    def slice(self) -> slice | None:
        """The units as a slice, if they are equally far from each other."""
        if len(self.starts) == 1:
            return slice(int(self.starts), int(self.starts) + self.count)
        if len(self.starts) != self.count or not self.count:
            return None
        first, step = int(self.starts[0]), int(self.starts[1] - self.starts[0])
        if step < 1 or not bool((self.starts.diff() == step).all()):
            return None
        return slice(first, first + step * self.count, step)

    def on(self, device: torch.device) -> Tensor:
        """:attr:`index` on a device, copied there once."""
        if device not in self._copies:
            self._copies[device] = to_device(self.index, device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy must not take along what is cached: addresses are those of the tensors here.
        return Units, (self.starts, self.lengths, self.count)

    @cached_property
    def runs(self) -> tuple[int, int, int]:
        """Addresses of starts and lengths, and the number of runs: what compiled code is given."""
        return self.starts.data_ptr(), self.lengths.data_ptr(), self.starts.numel()

    @staticmethod
    def every(n: int) -> Units:
        """All of ``n`` units, in one run."""
        return _every(n)

    def __add__(self, other: Units) -> Units:
        """These units, then others."""
        if not self.count or not other.count:
            return self if self.count else other
        starts, lengths = torch.cat([self.starts, other.starts]), torch.cat([self.lengths, other.lengths])
        return Units(starts, lengths, self.count + other.count)

    def is_all(self, n: int) -> bool:
        """Whether these are all of ``n`` units in their order, told without looking at them."""
        return self.count == n and len(self.starts) == 1


@lru_cache(maxsize=256)
def _every(n: int) -> Units:
    return Units(torch.tensor([0], device="cpu"), torch.tensor([n], device="cpu"), n)
