"""Linear layer with kept tiles of its weight: defined by :mod:`.reference`, computed by the backends next to it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from approxdrop_lightning.ops.backend import choose_backend
from approxdrop_lightning.ops.tile_linear import compact, reference
from approxdrop_lightning.patterns.tile import TilePattern


class TileLinearBackend(Protocol):
    """Function that a backend module provides; :mod:`.reference` defines its result."""

    def tile_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, pattern: TilePattern, scale: float
    ) -> Tensor:
        """``x @ (scale * weight * mask).T + bias``.

        Args:
            x: ``[R, n_in]``.
            weight: ``[n_out, n_in]``, dense; so is its gradient.
            bias: ``[n_out]`` or None.
            pattern: Pattern of the weight.
            scale: Factor of the kept weights.

        Returns:
            ``[R, n_out]``, contiguous.
        """
        ...


def tile_backend(backend: str, x: Tensor) -> TileLinearBackend:
    """The module that implements a backend.

    Args:
        backend: ``"auto"``, ``"reference"``, ``"compact"`` or ``"triton"``.
        x: Input of the layer, whose device and type determine the choice of ``"auto"``.

    Raises:
        ImportError: ``"triton"`` was requested but is not installed.
        ValueError: The backend is unknown.
    """
    chosen = choose_backend(backend, tiles_of=x)
    if chosen == "triton":
        from approxdrop_lightning.ops import triton_backend

        return triton_backend
    return reference if chosen == "reference" else compact
