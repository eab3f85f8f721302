"""Activation checkpointing."""

import pytest
import torch
from support.gallery import mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from approxdrop_lightning import approximate, resample


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net, self.lstm, self.reentrant = mlp(), nn.LSTM(10, 12, 2, dropout=0.5), reentrant

    def forward(self, x):
        return self._run(lambda x: self.lstm(x)[0], self._run(self.net, x))

    def _run(self, part, x):
        return part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("options", [{}, {"interleave": False}, {"rate": 0.3}])
def test_activation_checkpointing_computes_again_with_the_same_patterns(options):
    found = []
    for reentrant in (None, True, False):
        torch.manual_seed(0)
        model = Checkpointed(reentrant).double()
        approximate(model, min_gain=0, pattern_everywhere=True, seed=0, **options)
        x = torch.randn(5, 4, 20, dtype=torch.float64, requires_grad=True)
        for _ in range(3):
            resample(model)
            model.zero_grad()
            out = model(x) * 1.0
            out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in model.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_activation_checkpointing_of_a_dropout_used_twice_is_refused():
    model = nn.Sequential(*[layer := nn.Dropout(0.5)] * 2, nn.Linear(8, 8))
    approximate(model, min_gain=0, pattern_everywhere=True)
    resample(model)
    out = checkpoint(model, torch.randn(4, 8, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match="recomputes a dropout that was used 2 times"):
        out.sum().backward()
    assert layer is model[0]
