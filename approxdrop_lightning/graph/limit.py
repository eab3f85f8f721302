"""Tells when Dynamo compiles no more: beyond its limit of graphs it runs a function eagerly, without a word later."""

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
    """A converted model runs eagerly in part, because ``torch.compile`` may make no more graphs of it."""


@never_alone
def is_reached() -> bool:
    """Whether the caller runs eagerly in a function of which no more graphs are made, and nobody asked for it."""
    return get_eval_frame_callback() is False and eval_frame._stance.stance == "default"


def warn(site: Site) -> None:
    """Note that a dropout of a compiled model runs eagerly; warn of the first one of a model."""
    site.beyond_limit = True
    book = None if site.book is None else site.book()
    if book is None or book.warned_of_limit:
        return
    book.warned_of_limit = True
    warnings.warn(
        "torch.compile has reached its limit of graphs (torch._dynamo.config.recompile_limit="
        f"{dynamo.recompile_limit}): {site.name} and the layers beside it run eagerly in steps for which there is no "
        f"graph yet. A model with dropout needs {book.graphs} graphs for each size of a batch. Batches of one size "
        "(drop_last=True) need fewest; a larger limit, set before training, allows more; TORCH_LOGS=recompiles tells "
        "why there are so many",
        RecompileLimitWarning,
        stacklevel=4,
    )
