"""Decides for compiled graphs whether a product of kept units is worth its overhead."""

from __future__ import annotations

import torch


def worthwhile(saved: int, device: torch.device, dtype: torch.dtype, least: int | None = None) -> bool:
    """Whether so many saved multiplies are worth the gathers that they cost.

    Args:
        saved: Multiplies that are not executed, all products of one dropout together.
        device: Where the product runs.
        dtype: Type of its inputs.
        least: What the user asks for; None for what was measured.

    Returns:
        Whether to rewrite; else the dropout stays the native one.
    """
    if least is None:
        least = 2_000_000 if device.type == "cpu" else 100_000_000
    return saved > 0 and saved >= least
