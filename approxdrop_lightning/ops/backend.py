"""Which backend computes: by name, or by what it is expected to gain."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from approxdrop_lightning.ops import reference
from approxdrop_lightning.ops.row_linear import compact

BACKENDS = ("auto", "reference", "compact", "triton")
_HALVES = (torch.float16, torch.bfloat16)


def check_backend(backend: str) -> str:
    """Return ``backend``; raise ``ValueError`` if there is none of that name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def least_saved(device: torch.device, dtype: torch.dtype) -> int:
    """Multiplies that a dropout must save in one product to gain more than its bookkeeping costs.

    Measured by whole steps: on 2 CPU cores (README, Results) and on an H100 (docs/gpu_model.md).
    """
    if device.type == "cpu":
        return 20_000_000
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return 250_000_000_000 if _on_tensor_cores(dtype) else 25_000_000_000


def ops_for(backend: str, tiles_of: Tensor | None = None) -> ModuleType:
    """The module that computes.

    ``"auto"`` is ``compact``; for tiles of 16-bit types on CUDA it is ``triton``. With rows the vendor's products of
    what was gathered were faster than Triton's in all cases but one (docs/gpu_model.md).

    Args:
        backend: ``"auto"``, ``"reference"``, ``"compact"`` or ``"triton"``.
        tiles_of: What a product with kept tiles is formed of; None for one with kept rows and columns.

    Raises:
        ImportError: ``"triton"`` is asked for and not installed.
        ValueError: The backend is unknown.
    """
    if check_backend(backend) == "reference":
        return reference
    if backend == "compact" or (backend == "auto" and not _tiles_gain(tiles_of)):
        return compact
    if not has_triton():
        raise ImportError(
            "backend 'triton' needs triton, which is not installed: pip install 'approxdrop-lightning[triton]'"
        )
    from approxdrop_lightning.ops import triton_backend

    return triton_backend


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _tiles_gain(x: Tensor | None) -> bool:
    return x is not None and x.is_cuda and x.dtype in _HALVES and has_triton()


def _on_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype in _HALVES or (dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32)
