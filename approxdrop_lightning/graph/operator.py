"""The operator ``approxdrop::drop``: a dropout in a captured graph. It masks; the pass replaces it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from approxdrop_lightning.graph import packed
from approxdrop_lightning.graph.book import site_of


@torch.library.custom_op("approxdrop::drop", mutates_args=())
def drop(x: Tensor, table: Tensor, key: str, dp: int, keep: int) -> Tensor:
    """Dropout of ``x`` (``[*leading, n]``) by the pattern of a site.

    This implementation runs under backends without the pass: correct, but nothing is skipped. All uses of a site with
    the same shape then share a pattern.

    Args:
        x: The input.
        table: All patterns of the model.
        key: Identifies the site (:func:`.book.site_of`).
        dp: Period of this step.
        keep: Number of kept cells of this step.

    Returns:
        Like ``x``.
    """
    book, site = site_of(key)
    site.graph_masked = True
    site.in_graphs.add(True)
    leading = tuple(x.shape[:-1])
    entry = None if dp == keep or not x.dim() else book.use(site, 0, x.shape[-1], leading, (dp, keep), x.device)
    if entry is None:
        return x / (1 - site.rate) if dp == keep and site.scale_by == "rate" else x.clone()
    return packed.mask(x, book.table(x.device), entry.use, entry.rows)


@drop.register_fake
def _(x: Tensor, table: Tensor, key: str, dp: int, keep: int) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rest = inputs[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.approxdrop.drop(grad, ctx.saved_tensors[0], *ctx.rest), None, None, None, None


drop.register_autograd(_backward, setup_context=_setup)
DROP = (torch.ops.approxdrop.drop, torch.ops.approxdrop.drop.default)
