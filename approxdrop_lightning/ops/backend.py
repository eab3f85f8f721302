"""Names of the backends, and the choice behind ``"auto"``."""

from __future__ import annotations

import importlib.util
from functools import cache

from torch import Tensor

from approxdrop_lightning.ops.derivative import is_transformed
from approxdrop_lightning.policy import tiles_gain_by_triton

BACKENDS = ("auto", "reference", "compact", "triton")


def check_backend(backend: str) -> str:
    """Return ``backend`` if it is known.

    Raises:
        ValueError: The backend is unknown.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def choose_backend(backend: str, tiles_of: Tensor | None = None) -> str:
    """Resolve ``"auto"`` and check that the backend can be imported.

    ``"auto"`` resolves to ``"compact"``, except for tile patterns with 16-bit types on CUDA, where it resolves to
    ``"triton"``. For row patterns, vendor products of gathered operands beat the Triton kernels in all cases but one
    (docs/gpu_model.md). Under ``torch.func`` transforms and forward-mode AD every backend becomes ``"reference"``.

    Args:
        backend: ``"auto"``, ``"reference"``, ``"compact"`` or ``"triton"``.
        tiles_of: Input of a product with kept tiles; None for a product with kept rows and columns.

    Returns:
        ``"reference"``, ``"compact"`` or ``"triton"``.

    Raises:
        ImportError: ``"triton"`` was requested but is not installed.
        ValueError: The backend is unknown.
    """
    if check_backend(backend) != "reference" and is_transformed():
        return "reference"
    if backend == "auto":
        backend = "triton" if _tiles_gain(tiles_of) else "compact"
    if backend == "triton" and not has_triton():
        raise ImportError(
            "backend 'triton' needs triton, which is not installed: pip install 'approxdrop-lightning[triton]'"
        )
    return backend


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _tiles_gain(x: Tensor | None) -> bool:
    return x is not None and tiles_gain_by_triton(x.device, x.dtype) and has_triton()
