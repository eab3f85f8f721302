"""Linear layer between two row patterns: defined by :mod:`.reference`, computed by the backends next to it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from approxdrop_lightning.ops.backend import choose_backend
from approxdrop_lightning.ops.row_linear import compact, reference
from approxdrop_lightning.patterns.row import RowPattern


class RowLinearBackend(Protocol):
    """Functions that a backend module provides; :mod:`.reference` defines their results."""

    def pack(self, x: Tensor, pattern: RowPattern) -> Tensor:
        """Kept values of a dense ``[*leading, n]``: flat, group after group."""
        ...

    def unpack(self, values: Tensor, pattern: RowPattern, leading_shape: tuple[int, ...]) -> Tensor:
        """Dense ``[*leading, n]`` with zeros where the pattern drops; inverse of :meth:`pack`."""
        ...

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
    ) -> Tensor:
        """Kept units of ``act(scale * (x @ weight.T + bias))``.

        Args:
            x: Dense ``[*leading, n_in]``, or packed values if ``in_pattern`` is given.
            weight: ``[n_out, n_in]``, dense; so is its gradient.
            bias: ``[n_out]`` or None.
            in_pattern: Pattern of the inputs; None if all are read.
            out_pattern: Pattern of the outputs; None if all are computed.
            leading_shape: Shape of the batch.
            scale: Factor of product and bias.
            activation: One of :data:`.reference.ACTIVATIONS`, applied last.

        Returns:
            Rows ``[R, n_out]``, or packed values if ``out_pattern`` is given; contiguous, possibly flat.
        """
        ...


def row_backend(backend: str) -> RowLinearBackend:
    """The module that implements a backend.

    Args:
        backend: ``"auto"``, ``"reference"``, ``"compact"`` or ``"triton"``.

    Raises:
        ImportError: ``"triton"`` was requested but is not installed.
        ValueError: The backend is unknown.
    """
    chosen = choose_backend(backend)
    if chosen == "triton":
        from approxdrop_lightning.ops import triton_backend

        return triton_backend
    return reference if chosen == "reference" else compact
