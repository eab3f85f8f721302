"""The report: what is skipped, what is not and why, and the share of multiplies saved."""

import pytest
import torch
from support.flops import Flops
from support.gallery import mlp
from support.skipping import set_thresholds
from torch import nn

from approxdrop_lightning import approximate, resample, restore


def test_the_report_says_what_is_skipped_and_why_not(monkeypatch):
    set_thresholds(monkeypatch, features=64, saved=16 * 64 * 128 // 2)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 128), nn.Dropout(0.0), nn.Linear(128, 32),
        nn.Dropout(0.4), nn.LayerNorm(32), nn.Dropout(1.0), nn.AlphaDropout(0.3),
    )  # fmt: skip
    report = approximate(model)
    assert report["2"].skipped == "not known before the first training batch"
    resample(model)
    model(torch.randn(16, 64)).sum().backward()
    row = report["2"]
    assert (row.producer, row.consumers, row.skipped) == (
        "0",
        ("3",),
        "producer's rows and consumers' columns",
    )
    assert "rate is 0" in report["4"].skipped
    assert "32 features are too few" in report["6"].skipped
    assert "drops everything" in report["8"].skipped
    assert "AlphaDropout" in report["9"].skipped
    assert all(name in str(report) for name in ("2", "producer's rows", "AlphaDropout"))


@pytest.mark.parametrize(
    ("between", "name"),
    [
        (nn.BatchNorm1d(64), "BatchNorm1d"),
        (nn.LayerNorm(64), "LayerNorm"),
        (nn.Softmax(-1), "softmax"),
    ],
)
def test_what_reads_the_layer_before_whole_is_named(between, name):
    """It reads all units of the layer, so none of its rows can be skipped; this is not the model's fault."""
    model = nn.Sequential(nn.Linear(16, 64), between, nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 4), nn.Dropout(0.5))
    report = approximate(model, min_gain=0)
    for _ in range(2):
        resample(model)
        model(torch.randn(16, 16)).sum().backward()
    row = report["3"]
    assert (row.producer, row.whole, row.consumers) == (None, f"read whole by {name}", ("4",))
    assert row.skipped == f"consumers' columns; 0 is read whole by {name}"
    assert f"read whole by {name}" in str(report)
    assert report["5"].whole is None  # it has a producer


def test_layers_far_before_a_dropout_are_not_named():
    """What other products were made of has nothing to do with the dropout."""
    model = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Conv1d(1, 1, 3, padding=1), nn.Dropout(0.5))
    report = approximate(model, min_gain=0)
    resample(model)
    normed = model[1](model[0](torch.randn(16, 1, 8)))
    model[3](model[2](normed)).sum().backward()
    assert report["3"].whole is None
    assert "no linear layer before it" in report["3"].skipped


def test_a_frozen_part_is_reported():
    """As after LightningModule.freeze: in evaluation mode, without gradients."""
    model = mlp()
    report = approximate(model, min_gain=0)
    model[1].eval().requires_grad_(False)
    resample(model)
    model(torch.randn(4, 20)).sum().backward()
    assert report["1.3"].skipped == (
        "nothing: not called in training mode so far: frozen, not used, or a function (of attention, for one) is "
        "given its rate, the model's own of 0.5"
    )
    assert report["0"].consumers == ("F.linear",)  # layer 1.0 is a stock one, whose function reads kept units, too
    assert "producer's rows and consumers' columns" in report["4"].skipped


def test_a_rate_that_is_not_the_models_is_shown_beside_it():
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.0), nn.Linear(64, 2))
    assert "0.7 (own: 0.5)" in str(report := approximate(model, rate=0.7))
    assert (report["3"].rate, report["3"].own_rate) == (0.7, 0.0)
    restore(model)
    assert "own:" not in str(approximate(model, rate=None))


class Mixed(nn.Module):
    """Layers of every counted kind, called in every way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True, kdim=32, vdim=16)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 64))

    def forward(self, x):  # [5, 4, 4, 4]
        x = self.up(self.conv(x)).flatten(1).unflatten(1, (4, 64))
        y, _ = self.attention(x, value=x[..., :16], key=x[..., 32:])
        return self.mlp(self.norm(y))


def test_the_saved_share_is_one_of_the_whole_model():
    model = Mixed()
    with Flops() as dense:
        model(torch.randn(5, 4, 4, 4))
    report = approximate(model, seed=0, min_gain=0)
    for _ in range(2):
        resample(model)
        with Flops() as executed:
            model(torch.randn(5, 4, 4, 4)).sum()
        assert report.multiplies == dense.total / 2
        assert report.saved == pytest.approx(1 - executed.total / dense.total) and report.saved > 0.1
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_cannot_be_converted_count_too():
    model = nn.ModuleList([nn.GRU(8, 16, 2, bidirectional=True), nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5))])
    report = approximate(model)
    resample(model)
    y, _ = model[0](torch.randn(3, 5, 8))
    model[1](y).sum().backward()
    gates = 3 * 16 * 2 * 15  # both directions, 15 rows
    assert report.elsewhere == gates * (8 + 16) + gates * (32 + 16)


@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_the_report_counts_what_is_saved_in_expectation(rate):
    """Two dropouts of one rate share their period, so the mean of the square counts, estimated over many steps."""
    model = nn.Sequential(
        nn.Linear(60, 240), nn.ReLU(), nn.Dropout(rate), nn.Linear(240, 120), nn.Dropout(rate), nn.Linear(120, 60)
    )
    report = approximate(model, min_gain=0, seed=0)
    dense = 60 * 240 + 240 * 120 + 120 * 60
    executed = []
    for _ in range(300):
        resample(model)
        with Flops() as counter:
            model(torch.randn(12, 60)).sum()
        executed.append(counter.total / (2 * 12 * dense))
    spread = torch.tensor(executed).std().item() / 300**0.5
    assert report.saved > 0.5
    assert report.saved == pytest.approx(1 - sum(executed) / 300, abs=max(4 * spread, 1e-9))
    assert report.saved_by(report["2"]) == pytest.approx(rate * (60 * 240 + 240 * 120) / dense)
    assert report.saved_by(report["4"]) == pytest.approx(rate * (240 * 120 + 120 * 60) / dense)


def test_a_notebook_shows_the_table_with_names_as_text():
    model = nn.ModuleDict({"<b>": nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))})
    report = approximate(model)
    shown = report._repr_html_()
    assert shown.count("<tr>") == 2 and shown.count("<th>") == 6
    assert "<td>&lt;b&gt;.1</td><td>0.5</td>" in shown and "<b>" not in shown
    assert "not known before the first training batch" in shown
    assert "saved in expectation: 0%" in shown
