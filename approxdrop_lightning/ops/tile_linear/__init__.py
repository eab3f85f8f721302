"""Linear layer with kept tiles of its weight: :mod:`.reference` defines it, the backends beside it compute it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from approxdrop_lightning.ops.backend import choose_backend
from approxdrop_lightning.ops.tile_linear import compact, reference
from approxdrop_lightning.patterns.tile import TilePattern


class TileLinearBackend(Protocol):
    """Function of a module that computes linear layers with kept tiles, as :mod:`.reference` defines them."""

    def tile_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, pattern: TilePattern, scale: float
    ) -> Tensor: ...


def tile_backend(backend: str, x: Tensor) -> TileLinearBackend:
    """The module that computes.

    Args:
        backend: ``"auto"``, ``"reference"``, ``"compact"`` or ``"triton"``.
        x: Input of the layer: its device and type decide what ``"auto"`` is.

    Raises:
        ImportError: ``"triton"`` is asked for and not installed.
        ValueError: The backend is unknown.
    """
    chosen = choose_backend(backend, tiles_of=x)
    if chosen == "triton":
        from approxdrop_lightning.ops import triton_backend

        return triton_backend
    return reference if chosen == "reference" else compact
