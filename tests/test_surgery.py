"""Conversion: correct, reversible, and never silently different."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from support.gallery import mlp
from torch import nn

from approxdrop_lightning import ApproxLinear, ApproxLSTM, approximate, resample, restore
from approxdrop_lightning.surgery import NoEffectWarning


def test_restore_gives_the_ordinary_classes_back():
    model = nn.Sequential(mlp(), nn.Dropout2d(0.5))
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    approximate(model)
    assert any(isinstance(m, ApproxLinear) for m in model.modules())
    restore(model)
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert [id(p) for p in model.parameters()] == parameters
    approximate(model)  # a second time


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x):
        x = F.dropout(self.drop(self.up(x)), 0.2, self.training)
        return self.down(nn.functional.dropout1d(x, 0.1))


def test_functional_dropout_and_dropout_inside_other_layers_are_named():
    model = nn.Sequential(Functional(), nn.MultiheadAttention(8, 2, dropout=0.1), nn.GRU(8, 8, 2, dropout=0.2))
    report = approximate(model, min_gain=0)
    lines = {row.name: row.skipped for row in report}
    calls = [name for name in lines if "test_surgery.py:" in name]
    assert len(calls) == 2
    assert all(name.startswith("0 (") and "a function" in lines[name] for name in calls)
    assert "MultiheadAttention is left as it is" in lines["1 (attention weights)"]
    assert "GRU is left as it is" in lines["2 (between its layers)"]
    resample(model)
    model[0](torch.randn(2, 5, 8)).sum().backward()  # dropout of a dropped-out tensor: dense, and it runs


def test_rate_0_turns_the_models_dropout_off():
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.LSTM(64, 64, 2, dropout=0.5))
    stock = copy.deepcopy(model).eval()
    with pytest.warns(NoEffectWarning):
        report = approximate(model, rate=0.0)
    resample(model)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(model(x)[0], stock(x)[0])
    assert [row.skipped for row in report] == ["nothing: the rate is 0"] * 2


def test_conversion_after_the_optimizer_was_built():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.clone() for p in model.parameters()]
    approximate(model, min_gain=0)
    resample(model)
    model(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_restored_model_can_be_exported():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    approximate(model)
    restore(model)
    x = torch.randn(3, 8)
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_unsupported_lstms_are_left_alone_by_name():
    model = nn.ModuleDict(
        {
            "both": nn.LSTM(4, 4, 2, dropout=0.5, bidirectional=True),
            "projected": nn.LSTM(4, 4, 2, dropout=0.5, proj_size=2),
            "plain": nn.LSTM(4, 4, 2, dropout=0.5),
        }
    )
    report = approximate(model)
    assert "bidirectional" in report["both (after layer 0)"].skipped
    assert "proj_size" in report["projected (after layer 0)"].skipped
    assert [type(m) for m in model.values()] == [nn.LSTM, nn.LSTM, ApproxLSTM]


def test_weight_norm_is_left_alone():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Dropout(0.5), nn.Linear(8, 8))
    kind = type(model[0])
    approximate(model, min_gain=0)
    assert type(model[0]) is kind
    assert type(model[2]) is ApproxLinear
    resample(model)
    model(torch.randn(4, 8)).sum().backward()
    assert model[0].parametrizations.weight.original1.grad.any()


def test_nothing_to_convert_warns():
    with pytest.warns(NoEffectWarning, match="no dropout could be converted"):
        assert len(approximate(nn.Linear(3, 3))) == 0


def test_misuse_is_named():
    model = mlp()
    with pytest.raises(ValueError, match="not converted"):
        resample(model)
    with pytest.raises(ValueError, match="not converted"):
        restore(model)
    approximate(model)
    with pytest.raises(ValueError, match="converted already"):
        approximate(model)
    other = mlp()
    for options, message in (
        ({"pattern": "diagonal"}, "pattern must be one of 'row', 'tile', 'dropconnect', got 'diagonal'"),
        ({"pattern": "tile", "recurrent": True}, "recurrent=True needs pattern='row', got 'tile'"),
        ({"rate": 1.5}, r"\[0, 1\), got 1.5"),
        ({"scale": "none"}, "scale must be 'rate' or 'dp', got 'none'"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"block_size": 0}, "block_size must be an integer >= 1"),
        ({"interleave": "yes"}, "interleave must be True or False"),
        ({"rate": 0.95}, "smallest max_dp that serves is 20"),
        ({"recurrent": 1}, "recurrent must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            approximate(other, **options)
    assert all("Approx" not in type(m).__name__ for m in other.modules())  # nothing was touched


@pytest.mark.parametrize("seed", ["3", 1.0, True, float("nan"), [1]])
def test_a_seed_that_is_no_integer_is_named_and_changes_nothing(seed):
    model = mlp()
    with pytest.raises(
        ValueError, match=f"approximate: seed must be an integer or None, got {re.escape(repr(seed))}"
    ):
        approximate(model, seed=seed)
    assert not any(isinstance(m, ApproxLinear) for m in model.modules())
    approximate(model, seed=torch.tensor(3).numpy()[()])  # whose type is NumPy's


def test_an_infeasible_rate_of_the_model_leaves_it_untouched():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout(0.95))
    with pytest.raises(ValueError, match="smallest max_dp that serves is 20"):
        approximate(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Dropout, nn.Dropout]
