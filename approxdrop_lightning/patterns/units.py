"""Ordered selections of units, stored as ranges of consecutive units."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.device import to_device


class UnitsStruct(ctypes.Structure):
    """``Units`` in ``kernels.h``, the form in which compiled code receives them."""

    _fields_ = [
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("ranges", ctypes.c_int64),
        ("count", ctypes.c_int64),
    ]


@dataclass(frozen=True, eq=False)
class Units:
    """An ordered selection of units, stored as ranges of consecutive units, each of which is copied as a whole.

    Attributes:
        starts: First unit of each range, int64.
        lengths: Number of units in each range, int64.
        count: Total number of units.
    """

    starts: Tensor
    lengths: Tensor
    count: int

    @cached_property
    def index(self) -> Tensor:
        """Indices of all units, int64."""
        if len(self.starts) == self.count:  # all ranges have length one
            return self.starts
        if self.count and bool((self.lengths == self.lengths[0]).all()):
            return (self.starts[:, None] + torch.arange(int(self.lengths[0]), device="cpu")).view(-1)
        shift = self.starts - self.lengths.cumsum(0) + self.lengths
        return shift.repeat_interleave(self.lengths, output_size=self.count) + torch.arange(self.count, device="cpu")

    @cached_property
    def slice(self) -> slice | None:
        """The units as a slice; None unless they are evenly spaced and ascending."""
        if len(self.starts) == 1:
            return slice(int(self.starts), int(self.starts) + self.count)
        if len(self.starts) != self.count or not self.count:
            return None
        first, step = int(self.starts[0]), int(self.starts[1] - self.starts[0])
        if step < 1 or not bool((self.starts.diff() == step).all()):
            return None
        return slice(first, first + step * self.count, step)

    def on(self, device: torch.device) -> Tensor:
        """:attr:`index` on a device; copied on first use."""
        if device not in self._copies:
            self._copies[device] = to_device(self.index, device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the cached attributes: the addresses in `struct` belong to this object's tensors.
        return Units, (self.starts, self.lengths, self.count)

    @cached_property
    def struct(self) -> UnitsStruct:
        """The units in the form that compiled code reads; valid as long as this object is alive."""
        return UnitsStruct(self.starts.data_ptr(), self.lengths.data_ptr(), self.starts.numel(), self.count)

    @staticmethod
    def every(n: int) -> Units:
        """All of ``n`` units, as one range."""
        return _every(n)

    def __add__(self, other: Units) -> Units:
        """Concatenate two selections."""
        if not self.count or not other.count:
            return self if self.count else other
        starts, lengths = torch.cat([self.starts, other.starts]), torch.cat([self.lengths, other.lengths])
        return Units(starts, lengths, self.count + other.count)

    def is_all(self, n: int) -> bool:
        """Whether these are all of ``n`` units in natural order; does not read the tensors."""
        return self.count == n and len(self.starts) == 1


@lru_cache(maxsize=256)
def _every(n: int) -> Units:
    return Units(torch.tensor([0], device="cpu"), torch.tensor([n], device="cpu"), n)
