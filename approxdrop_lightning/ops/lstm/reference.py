"""The definition of the LSTM recurrence, differentiated by autograd and used as the test oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence(
    gates: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`approxdrop_lightning.ops.lstm.sequence`."""
    h, c, outputs = h0, c0, []
    for gates_t in gates:
        read = h if kept is None else h.index_select(1, kept)
        i, f, g, o = (gates_t + read @ weight.t()).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs), h, c
