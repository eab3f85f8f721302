"""LSTM layers: recurrent dropout, and the vendor's kernel with masks."""

import pytest
import torch
from support.skipping import set_thresholds
from torch import nn

from approxdrop_lightning import approximate, resample
from approxdrop_lightning.benchmark import contenders, workloads


def test_recurrent_dropout_has_rows_of_its_own():
    model = nn.ModuleList([nn.LSTM(8, 128, 2, dropout=0.5), nn.LSTM(8, 128)])
    report = approximate(model, recurrent=True, seed=0)
    resample(model)
    for lstm in model:
        lstm(torch.randn(3, 5, 8))[0].sum().backward()
    assert report["0 (recurrent, layer 1)"].skipped == "consumers' columns"
    assert report["0 (recurrent, layer 1)"].consumers == ("0",)
    assert report["1 (recurrent, layer 0)"].skipped == "nothing: the rate is 0"
    inputs, hidden = 15 * 4 * 128 * 8, 15 * 4 * 128 * 128
    # of the first LSTM: both recurrent products, and the input of its second layer
    assert report.saved == pytest.approx(0.5 * 3 * hidden / (2 * inputs + 4 * hidden))


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("pattern", ["row", "shared"])
def test_an_lstm_too_small_for_a_gpu_is_the_vendor_s_with_masks(pattern, recurrent, monkeypatch):
    """Input masked, and recurrent weights: the same loss and gradients as by the recurrence that skips."""
    found = []
    set_thresholds(monkeypatch)
    for masked in (False, True):
        if masked:
            set_thresholds(monkeypatch, saved_lstm=1 << 60)
        torch.manual_seed(0)
        workload = workloads.lstm(24, 2, 5, 6, 30)
        options = {"recurrent": recurrent, "pattern_everywhere": True}
        step = contenders.contender(workload, pattern, 0.5, **options)
        found.append([step.loss_and_gradients(), *(p.grad for p in step.model.parameters())])
        readers = {name for site in step.report.sites for name in site.consumers}
        assert any("lstm" in name for name in readers) is not masked
    for skipped, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, skipped, rtol=1e-4, atol=1e-6)
