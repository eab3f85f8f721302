"""Uses of dropouts with random patterns, as a book enters them."""

import torch

from approxdrop_lightning.graph.layout import TableUse, layout_of


def two_uses(dp, keep, orders, n=160):
    """Two uses of one layout, and a table of random orders for both."""
    layout = layout_of(n, dp, keep, orders=orders)
    table = torch.zeros(2 * layout.size, dtype=torch.int64)
    uses = TableUse(0, 1.0, *layout), TableUse(layout.size, 1.0, *layout)
    for use in uses:
        block_at = torch.stack([torch.randperm(layout.blocks) for _ in range(layout.orders)])
        count = layout.orders * layout.blocks
        table[use.at : use.at + count] = block_at.argsort(1).flatten()
        table[use.at + count : use.at + 2 * count] = block_at.flatten()
        table[use.at + 2 * count] = layout.kept
    return uses, table
