"""A warning when Dynamo stops compiling: beyond its limit of graphs it silently runs a function eagerly."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch._dynamo.config as dynamo
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import eval_frame

from approxdrop_lightning.graph.frames import never_alone

if TYPE_CHECKING:
    from approxdrop_lightning.layers.site import Site


class RecompileLimitWarning(UserWarning):
    """Part of a converted model runs eagerly because ``torch.compile`` has reached its limit of graphs."""


@never_alone
def is_reached() -> bool:
    """Whether the caller runs eagerly because of the limit, and not because the user asked for it."""
    return get_eval_frame_callback() is False and eval_frame._stance.stance == "default"


def warn(site: Site) -> None:
    """Note that a dropout of a compiled model runs eagerly; warn once per model."""
    site.beyond_limit = True
    book = None if site.book is None else site.book()
    if book is None or book.warned_of_limit:
        return
    book.warned_of_limit = True
    warnings.warn(
        "torch.compile has reached its limit of graphs (torch._dynamo.config.recompile_limit="
        f"{dynamo.recompile_limit}): {site.name} and the layers beside it run eagerly in steps for which there is no "
        f"graph yet. This model needs {book.graphs} graphs for each batch size. Use batches of one size "
        "(drop_last=True), or raise the limit before training; TORCH_LOGS=recompiles shows what causes recompiles",
        RecompileLimitWarning,
        stacklevel=4,
    )
