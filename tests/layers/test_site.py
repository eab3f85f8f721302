"""Dropout sites: the patterns that they draw."""

import pytest
import torch
from support.gallery import EmbeddedLSTM
from support.skipping import set_thresholds
from torch import nn

from approxdrop_lightning import approximate, resample
from approxdrop_lightning.layers.compact_tensor import CompactTensor


def test_a_site_whose_width_changes_between_batches_draws_another_pattern():
    model = nn.Dropout(0.5)
    approximate(model, min_gain=0, pattern_everywhere=True)
    for width in (16, 24, 16):
        resample(model)
        x = torch.ones(6, width, requires_grad=True)
        torch.testing.assert_close(model(x) * 1.0, model.last_patterns[0].mask(6) * 2.0)
        assert len(model.last_patterns) == 1


def test_the_global_generator_is_not_used():
    model = EmbeddedLSTM()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    approximate(model, pattern_everywhere=True)
    resample(model)
    model(torch.randint(30, (4, 3), generator=torch.Generator())).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_of_large_batches_take_several_orders():
    model = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.7), nn.Linear(64, 8))
    approximate(model, min_gain=0, seed=0)
    for shape, expected in (((35, 20, 20), 3), ((700, 20), 3), ((3, 4, 20), 1), ((12, 20), 1)):
        resample(model)
        model(torch.randn(shape)).sum().backward()
        (pattern,) = model[1].last_patterns
        assert pattern.n_orders >= expected if expected > 1 else pattern.n_orders == 1


@pytest.mark.parametrize(
    ("rate", "hidden", "reader", "masked"),
    [(0.3, 256, "LSTM", True), (0.3, 320, "LSTM", False), (0.7, 256, "LSTM", False), (0.7, 256, "Linear", True),
     (0.7, 320, "Linear", False)],
)  # fmt: skip
def test_narrow_sequences_are_not_worth_skipping(rate, hidden, reader, masked, monkeypatch):
    """From rate .5 on, they are in networks with an LSTM."""
    set_thresholds(monkeypatch, sequence=300)
    model = nn.ModuleList([nn.Dropout(rate), getattr(nn, reader)(hidden, 8)])
    report = approximate(
        model, seed=0, pattern_everywhere=True, concentration=float("inf")
    )  # always (10, 7) or (10, 3)
    resample(model)
    x = torch.ones(35, 20, hidden)
    dropped = model[0](x)
    model[1](dropped)[0].sum().backward()
    assert model[0].last_patterns[0].n_orders > 1
    assert isinstance(dropped, CompactTensor) != masked
    assert ("features of sequences are too few to gain (fewer than 300" in str(report)) == masked
    assert (dropped == 0).float().mean() == pytest.approx(rate, abs=0.01)
