"""Tensors side by side and added up stay lazy: what is skipped of them, and where they give way.

That values and gradients are those of the masked model is shown with the gallery's models, in test_gallery.py,
test_late_readers.py and test_derivatives.py.
"""

import copy

import pytest
import torch
from support.flops import executed_share
from support.gallery import Sums, Towers
from support.skipping import set_thresholds
from support.twin import twin
from torch import nn
from torch.utils.checkpoint import checkpoint

from approxdrop_lightning import approximate, resample
from approxdrop_lightning.conversion import conversion_of
from approxdrop_lightning.layers.combined import PendingCombination
from approxdrop_lightning.layers.compact_tensor import CompactTensor
from approxdrop_lightning.patterns.joined import JoinedPattern

ALL = {"min_gain": 0, "pattern_everywhere": True}


class Pair(nn.Module):
    """Two layers, what ``combine`` makes of them, an activation, a dropout and a reader."""

    def __init__(self, combine, widths=(64, 64), activation=None, n=None):
        super().__init__()
        self.a, self.b = (nn.Linear(16, width) for width in widths)
        self.combine, self.activation, self.dropout = combine, activation or nn.PReLU(), nn.Dropout(0.5)
        self.out = nn.Linear(n or sum(widths), 8)

    def forward(self, x):
        return self.out(self.dropout(self.activation(self.combine(self.a(x), self.b(x)))))


def cat(a, b):
    return torch.cat([a, b], dim=-1)


@pytest.mark.parametrize(
    ("make", "rows", "producers"),
    [
        (lambda: Pair(cat), (12,), "a, b"),
        (lambda: Pair(cat, widths=(48, 96)), (5, 4), "a, b"),
        (lambda: Pair(lambda a, b: torch.concat((a, b), dim=1)), (12,), "a, b"),
        (lambda: Pair(lambda a, b: torch.cat([a, torch.ones(12, 64), b.tanh()], 1), n=192), (12,), "a, b"),
        (lambda: Pair(lambda a, b: a + b, n=64), (12,), "a, b"),
        (lambda: Pair(lambda a, b: torch.add(a.relu(), b) + 1, n=64, activation=nn.GELU()), (3, 4), "a, b"),
    ],
    ids=["cat", "widths", "concat", "an ordinary tensor between", "sum", "torch.add"],
)
def test_both_layers_compute_kept_units_only(make, rows, producers):
    model = make()
    report = approximate(model, seed=0, **ALL)
    resample(model)
    model(torch.randn(*rows, 16)).sum().backward()
    row = report["dropout"]
    assert (row.producer, row.consumers, row.skipped) == (
        producers,
        ("out",),
        "producer's rows and consumers' columns",
    )
    assert report.saved > 0.4


@pytest.mark.parametrize("model", [Pair(cat, widths=(256, 256)), Pair(lambda a, b: a + b, widths=(256, 256), n=256)])
def test_half_of_the_multiplies_are_executed(model, monkeypatch):
    assert executed_share(model, torch.randn(64, 16), monkeypatch, interleave=False, **ALL) == 1 / 2


def test_each_tensor_of_a_concatenation_has_a_pattern_of_its_own():
    model = Pair(cat, widths=(64, 96))
    report = approximate(model, seed=0, **ALL)
    resample(model)
    model(torch.randn(12, 16)).sum().backward()
    (pattern,) = report["dropout"].site.last_patterns
    assert isinstance(pattern, JoinedPattern) and [piece.n for piece in pattern.pieces] == [64, 96]
    for piece in pattern.pieces:
        assert piece.share == pytest.approx(0.5, abs=0.1)


def test_narrow_tensors_have_one_pattern_together(monkeypatch):
    set_thresholds(monkeypatch, features=32)
    model = Pair(cat, widths=(64, 16))
    report = approximate(model, seed=0)
    resample(model)
    model(torch.randn(12, 16)).sum().backward()
    (pattern,) = report["dropout"].site.last_patterns
    assert not isinstance(pattern, JoinedPattern)
    assert report["dropout"].consumers == ("out",)


def test_the_same_patterns_again():
    model = Pair(cat)
    approximate(model, seed=0, **ALL)
    resample(model)
    x = torch.randn(12, 16)
    first = model(x) * 1.0
    conversion_of(model).resample(fresh=False)
    torch.testing.assert_close(model(x) * 1.0, first, rtol=0, atol=0)
    resample(model)
    assert not torch.allclose(model(x) * 1.0, first)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("combine", [cat, lambda a, b: a + b], ids=["cat", "sum"])
def test_activation_checkpointing(use_reentrant, combine):
    """A first forward pass without gradients knows nothing of combinations: the pattern is one of all units."""
    model = Pair(combine, n=128 if combine is cat else 64).double()
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0, **ALL)
    resample(model)
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    (checkpoint(model, x, use_reentrant=use_reentrant) * 1.0).sum().backward()
    masked = twin(stock, report)
    masked(x).sum().backward()
    for mine, theirs in zip(model.parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


def test_autocast():
    model = Pair(cat)
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0, **ALL)
    resample(model)
    x = torch.randn(12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x) * 1.0
        expected = twin(stock, report)(x)
    assert report["dropout"].producer == "a, b"
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "combine",
    [
        lambda a, b: torch.cat([a, b], dim=0),
        lambda a, b: torch.stack([a, b]),
        lambda a, b: torch.add(a, b, alpha=2),
        lambda a, b: a[:1] + b,
        lambda a, b: torch.cat([a.double(), b], dim=-1),
    ],
    ids=["rows", "stack", "alpha", "broadcast", "types"],
)
def test_other_combinations_are_dense_and_right(combine):
    x = torch.randn(12, 16)
    torch.manual_seed(0)
    a, b = nn.Linear(16, 8), nn.Linear(16, 8)
    model = nn.ModuleList([a, b, nn.Dropout(0.5), nn.Linear(8, 8)])
    expected = combine(a(x), b(x))
    approximate(model, seed=0, **ALL)
    resample(model)
    found = combine(a(x), b(x))
    assert not isinstance(found, PendingCombination)
    torch.testing.assert_close(found * 1.0, expected)


def test_what_is_read_whole_first_is_one_tensor_for_all():
    """Changed in place by one reader, it is changed for the others, and the layers stop waiting after the step."""
    model = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(16, 4)])
    stock = copy.deepcopy(model)
    approximate(model, seed=0, **ALL)
    x = torch.randn(12, 16)
    resample(model, x)
    y = cat(model[0](x), model[1](x))
    assert isinstance(y, PendingCombination)
    y.add_(1.0)
    torch.testing.assert_close(y * 2, (cat(stock[0](x), stock[1](x)) + 1) * 2)
    (y.sum() + model[3](model[2](torch.randn(12, 16))).sum()).backward()
    assert model[0].weight.grad is not None
    resample(model, x)
    assert not model[0].defers and not model[1].defers


def test_a_prelu_of_many_weights_ends_what_waits():
    model = Pair(cat, activation=nn.PReLU(128))
    report = approximate(model, seed=0, **ALL)
    resample(model)
    model(torch.randn(12, 16)).sum().backward()
    assert (report["dropout"].producer, report["dropout"].consumers) == (None, ("out",))
    assert "a is read whole by prelu" in report["dropout"].skipped


def test_the_weight_of_a_prelu_may_change_only_after_the_read():
    model = Pair(cat)
    approximate(model, seed=0, **ALL)
    resample(model)
    x = torch.randn(12, 16)
    waiting = model.activation(cat(model.a(x), model.b(x)))
    with torch.no_grad():
        model.activation.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        model.dropout(waiting)


def test_dropped_tensors_side_by_side_are_read_compactly():
    torch.manual_seed(0)
    model = Towers()
    report = approximate(model, seed=0, **ALL)
    resample(model)
    x = torch.randn(7, 12)
    both = torch.cat([model.a(model.left(torch.randn(7, 48)).relu()), model.b(model.right(x).relu())], dim=-1)
    assert isinstance(both, CompactTensor) and both.is_lazy
    model.out(both).sum().backward()
    assert report["a"].consumers == report["b"].consumers == ("out",)
    assert (report["a"].producer, report["b"].producer) == ("left", "right")
    shares = [report.saved_by(report[name]) for name in "ab"]
    assert shares[0] > shares[1] > 0  # of 14 and of 10 units


def test_dropped_tensors_of_different_rates_side_by_side_are_dense():
    model = nn.ModuleList([nn.Linear(16, 64), nn.Dropout(0.5), nn.Dropout(0.7), nn.Linear(128, 4)])
    report = approximate(model, seed=0, **ALL)
    resample(model)
    y = model[0](torch.randn(12, 16))
    both = torch.cat([model[1](y), model[2](y)], dim=-1)
    assert not isinstance(both, CompactTensor)
    model[3](both).sum().backward()
    assert report["1"].site.dense_readers == {"cat"}


def test_sums_of_more_than_two():
    torch.manual_seed(0)
    model = Sums()
    report = approximate(model, seed=0, **ALL)
    resample(model)
    model(torch.randn(4, 5, 12)).sum().backward()
    assert report["a"].producer == "others, own"
    assert report["b"].producer == "more, others, own"
