"""When skipping pays off: thresholds below which a dropout is applied as a mask."""

from __future__ import annotations

import torch

_HALVES = (torch.float16, torch.bfloat16)


def least_saved(device: torch.device, dtype: torch.dtype) -> int:
    """Fewest multiplies that a dropout must save in one product to outweigh its overhead.

    Measured with whole training steps on 2 CPU cores (docs/results.md, Speed) and on an H100 (docs/gpu_model.md).
    """
    if device.type == "cpu":
        return 20_000_000
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return 250_000_000_000 if _on_tensor_cores(dtype) else 25_000_000_000


def _on_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype in _HALVES or (dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32)
