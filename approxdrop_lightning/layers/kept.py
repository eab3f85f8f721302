"""What a dropped-out tensor holds: kept values, or the dense tensor that they are packed from on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from approxdrop_lightning import functional
from approxdrop_lightning.layers.contexts import saving_as_where, saving_hooks
from approxdrop_lightning.layers.lazy_tensor import version_of
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.policy import Thresholds

if TYPE_CHECKING:
    from approxdrop_lightning.layers.site import Site
    from approxdrop_lightning.layers.use import Use

#: Pattern, the leading shape by which it groups rows, and the shape of the dense tensor.
Packing = tuple[RowPattern, tuple[int, ...], tuple[int, ...]]


def unpacked(values: Tensor, packing: Packing) -> Tensor:
    """The dense tensor of kept values, by functions that can be differentiated at will."""
    pattern, rows, shape = packing
    return functional.unpack(values, pattern, rows, "reference").view(shape)


def masked(dense: Tensor, pattern: RowPattern, rows: tuple[int, ...], scale: float) -> Tensor:
    """A dense tensor with dropped entries zeroed and kept ones scaled."""
    return dense * pattern.mask(*rows, dtype=dense.dtype, value=scale, device=dense.device).view(dense.shape)


class Seen(Protocol):
    """What is told who reads a dropped-out tensor: a :class:`.Use`, or several of tensors side by side."""

    name: str
    backend: str
    ask: Thresholds

    @property
    def steps(self) -> int:
        """Steps that the site has begun."""

    @property
    def parts(self) -> list[Use]:
        """Uses of single sites, whose outputs are side by side."""

    def read_kept(self, name: str, multiplies: int) -> None:
        """A layer of that name reads kept values only, in a product of so many multiplies."""

    def read_whole(self, name: str) -> None:
        """A function of that name reads the dense tensor."""

    def saves_too_few(self, multiplies: int) -> bool:
        """Whether a product of so many multiplies had better read the dense tensor."""

    def saves_too_few_in_lstm(self, multiplies: int) -> bool:
        """Likewise of an LSTM's product."""

    def shares(self, multiplies: int) -> Sequence[tuple[Site, int]]:
        """Sites that so many multiplies of a product fall to."""


class Kept:
    """What a :class:`CompactTensor` holds.

    Args:
        shape: Shape that is shown, ``[..., n]``.
        pattern: What is kept of the ``n`` units.
        rows: Leading shape by which the pattern groups the rows; a later view may show another one.
        use: What is told who reads.
        given: Kept values as :func:`approxdrop_lightning.functional.pack` returns them.
        packed: Whether it is these; else it is the dense tensor to drop from, packed only if a consumer asks.
        scale: Factor of the kept entries of what is given.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        pattern: RowPattern,
        rows: tuple[int, ...],
        use: Seen,
        given: Tensor,
        packed: bool = True,
        scale: float = 1.0,
    ) -> None:
        self.shape, self.pattern, self.rows, self.use = shape, pattern, rows, use
        self.given, self.scale = given, scale
        self._values = given if packed else None
        #: Whether a change of what is given would change values that are yet to be computed.
        self.may_change = not packed
        self.dtype, self.device = given.dtype, given.device
        self._version = version_of(given)
        self._hooks = saving_hooks()

    @property
    def has_values(self) -> bool:
        """Whether kept values are there already."""
        return self._values is not None

    @property
    def has_changed(self) -> bool:
        return version_of(self.given) != self._version

    @property
    def packing(self) -> Packing:
        """How the values are packed: pattern, rows and the shape that is shown."""
        return self.pattern, self.rows, self.shape

    @property
    def values(self) -> Tensor:
        """Kept values, scaled."""
        if self._values is None:
            self._check()
            with saving_as_where(self._hooks):
                values = functional.pack(self.given, self.pattern, self.use.backend)
                self._values = values if self.scale == 1.0 else values * self.scale
                self.may_change = False
        return self._values

    def _check(self) -> None:
        if self.has_changed:
            raise RuntimeError(
                f"{self.use.name}: its output is read for the first time after its input was changed in place; "
                "read it before that"
            )

    def compute(self) -> Tensor:
        with saving_as_where(self._hooks):
            if self._values is not None:
                dense = functional.unpack(self._values, self.pattern, self.rows, self.use.backend)
                return dense.view(self.shape)
            self._check()
            return masked(self.given, self.pattern, self.rows, self.scale).view(self.shape)

    def with_values(self, values: Tensor, shape: tuple[int, ...]) -> Kept:
        """The same pattern with other values, shown in another shape."""
        return Kept(shape, self.pattern, self.rows, self.use, values)
