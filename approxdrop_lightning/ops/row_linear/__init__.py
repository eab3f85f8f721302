"""Linear layer between two row patterns: :mod:`.reference` defines it, the backends beside it compute it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from approxdrop_lightning.ops.backend import choose_backend
from approxdrop_lightning.ops.row_linear import compact, reference
from approxdrop_lightning.patterns.row import RowPattern


class RowLinearBackend(Protocol):
    """Functions of a module that computes linear layers between row patterns, as :mod:`.reference` defines them."""

    def pack(self, x: Tensor, pattern: RowPattern) -> Tensor: ...

    def unpack(self, values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor: ...

    def row_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        in_pattern: RowPattern | None,
        out_pattern: RowPattern | None,
        leading_shape: tuple[int, ...],
        scale: float = 1.0,
        activation: str = "identity",
    ) -> Tensor: ...


def row_backend(backend: str) -> RowLinearBackend:
    """The module that computes.

    Args:
        backend: ``"auto"``, ``"reference"``, ``"compact"`` or ``"triton"``.

    Raises:
        ImportError: ``"triton"`` is asked for and not installed.
        ValueError: The backend is unknown.
    """
    chosen = choose_backend(backend)
    if chosen == "triton":
        from approxdrop_lightning.ops import triton_backend

        return triton_backend
    return reference if chosen == "reference" else compact
