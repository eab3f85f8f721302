"""Decide: whether what a dropout of a graph drops is skipped, or PyTorch's own dropout runs.

Only what the graph shows is gathered here; the sizes from which skipping gains are in
:mod:`approxdrop_lightning.policy`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from approxdrop_lightning.graph.find import Drop, Dropouts
from approxdrop_lightning.graph.names import function_name
from approxdrop_lightning.graph.nodes import hint, multiplies
from approxdrop_lightning.graph.rules.rule import shape, value
from approxdrop_lightning.policy import Thresholds, product_dtype


def decide(dropouts: Dropouts, calls: Counter[Any]) -> None:
    """Enter a pattern for each dropout by which something is skipped; the reason is noted for all others.

    Args:
        dropouts: The dropouts of a graph, with their layers.
        calls: Number of uses of each functional dropout so far, in this graph and in those that it is part of or has.
    """
    layers: Counter[Any] = Counter()
    for drop in dropouts.drops.values():
        uses = calls if drop.book.is_call(drop.site) else layers
        number = uses[drop.site]
        uses[drop.site] += 1
        if not _has_units(drop):
            drop.native = True
            continue
        # Not by the pair: PyTorch's own dropout is the same in each step.
        reason = _against(drop, dropouts)
        drop.native = reason is not None
        drop.site.in_graphs.add(not drop.native)
        if drop.native:
            drop.site.too_small = reason or drop.site.too_small
        if drop.native or drop.pair[0] == drop.pair[1]:
            continue
        x = value(drop.x)
        before = _saved(drop, drop.producers)
        drop.packs_before = bool(drop.producers) and (thresholds(drop).before_compiled(before) or not drop.consumers)
        leading = tuple(hint(d) for d in shape(drop.x)[:-1])
        drop.entry = drop.book.use(drop.site, number, drop.n, leading, drop.pair, x.device)
        drop.native = drop.entry is None


def gains(drop: Drop, multiplies: int) -> bool:
    """Whether skipping gains in layers of so many multiplies together, whatever else is around the dropout."""
    return thresholds(drop).compiled(int(multiplies * drop.site.rate)) is None


def thresholds(drop: Drop) -> Thresholds:
    """The policy for the device and type of a dropout's input."""
    x = value(drop.x)
    found: Thresholds = drop.site.policy.at(x.device, product_dtype(x.device, x.dtype))
    return found


def _has_units(drop: Drop) -> bool:
    dims = shape(drop.x)
    return bool(dims) and isinstance(dims[-1], int) and 0 not in dims


def _against(drop: Drop, dropouts: Dropouts) -> str | None:
    """Why nothing is skipped, ``""`` if no layer is beside the dropout; None if skipping gains."""
    x, ask = value(drop.x), thresholds(drop)
    if x.device != value(drop.table).device:
        return f"its input is on {x.device}, not where the model's first parameter is"
    too_narrow: str | None = drop.site.too_narrow(ask, shape(drop.x))
    if too_narrow is not None:
        return too_narrow
    views = [view for order in drop.orders.values() for view in order]
    views += [view for consumer in drop.consumers for view in dropouts.path(consumer.args[0])[1]]
    if not all(map(dropouts.has_known_sizes, (drop.node, *drop.consumers, *views))):
        return "sizes of the batch vary in a way that cannot be told"
    if not drop.producers and not drop.consumers:
        return ""
    if not drop.consumers and (reason := ask.residual_sum(map(function_name, drop.node.users))):
        return reason
    return ask.compiled(_saved(drop, drop.producers) + _saved(drop, drop.consumers))


def _saved(drop: Drop, layers: list[Any]) -> int:
    """Multiplies that a dropout saves in these layers, in expectation."""
    return int(sum(map(multiplies, layers)) * drop.site.rate)
