"""Conversion with ``pattern="tile"`` and ``"dropconnect"``: who drops what, and that the report says so."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.gallery import Attention, mlp
from support.skipping import set_thresholds
from torch import nn
from torch.utils.checkpoint import checkpoint

from approxdrop_lightning import TilePattern, approximate, resample, restore
from approxdrop_lightning.conversion import conversion_of
from approxdrop_lightning.layers import TileLinear, TileLSTM
from approxdrop_lightning.patterns.tile import BernoulliPattern

TILE = {"pattern": "tile", "tile_size": 2, "min_gain": 0, "pattern_everywhere": True, "seed": 0}


def step(model, *inputs):
    resample(model)
    out = model(*inputs)
    (out[0] if isinstance(out, tuple) else out).sum().backward()


def weight(layer, pattern, scale):
    return layer.weight * (pattern.mask().to(layer.weight) * scale)


class Residual(nn.Module):
    """What one dropout leaves is read by a layer and by a sum."""

    def __init__(self, sum_first):
        super().__init__()
        self.drop, self.layer, self.sum_first = nn.Dropout(0.5), nn.Linear(8, 8), sum_first

    def forward(self, x):
        x = self.drop(x)
        if self.sum_first:
            total = x + 1
            return self.layer(x) + total
        return self.layer(x) + (x + 1)


@pytest.mark.parametrize("sum_first", [True, False])
@pytest.mark.parametrize("kind", ["tile", "dropconnect"])
def test_a_layer_drops_weights_and_all_others_see_units_dropped(kind, sum_first):
    """In any order: that somebody looks does not change what the layer does."""
    model = Residual(sum_first).double()
    report = approximate(model, **TILE | {"pattern": kind, "rate": 0.4})
    resample(model)
    x = torch.randn(5, 8, dtype=torch.float64)
    out = model(x)
    units, of_weight = sorted(report["drop"].site.last_patterns, key=lambda p: (p.n_out, p.n_in) == (8, 8))
    assert isinstance(units, BernoulliPattern) and (units.n_out, units.n_in, units.rate) == (5, 8, 0.4)
    assert type(of_weight) is (TilePattern if kind == "tile" else BernoulliPattern)
    dropped = x * (units.mask().double() / 0.6)
    expected = F.linear(x, weight(model.layer, of_weight, 1 / 0.6), model.layer.bias) + dropped + 1
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    what = "consumers' tiles" if kind == "tile" else "nothing: layer is masked and dense (pattern='dropconnect')"
    assert report["drop"].skipped == f"{what}; units are dropped for add"


def test_what_was_changed_in_place_is_read_as_it_is():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
    report = approximate(model, **TILE)
    resample(model)
    x = model[0](torch.randn(5, 8))
    x.mul_(0).add_(1)
    torch.testing.assert_close(model[1](x), model[1].weight.sum(1).expand(5, 3) + model[1].bias)
    assert not any(isinstance(p, TilePattern) for p in report["0"].site.last_patterns)


def test_each_weight_has_a_pattern_of_its_own():
    model = Attention()
    report = approximate(model, **TILE)
    offsets = set()
    for _ in range(30):
        step(model, torch.randn(3, 5, 12))
        patterns = report["drop"].site.last_patterns
        assert [(p.n_out, p.n_in) for p in patterns] == [(8, 12), (8, 12), (10, 12)]
        assert len({(p.dp, p.keep) for p in patterns}) == 1
        offsets.add(tuple(p.offset for p in patterns[:2]))
    assert {(0, 1), (1, 0), (0, 0), (1, 1)} <= offsets


def test_the_report_says_what_is_skipped_and_why_not():
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 128), nn.Dropout(0.4), nn.Linear(128, 10),
        nn.Dropout(0.3), nn.LayerNorm(10), nn.Dropout(0.0),
    )  # fmt: skip
    report = approximate(model, pattern="tile", seed=0)
    assert report["2"].skipped == "not known before the first training batch"
    step(model, torch.randn(16, 64))
    assert (report["2"].producer, report["2"].consumers, report["2"].skipped) == (None, ("3",), "consumers' tiles")
    assert report["4"].skipped == "nothing: 5: a side of 10 is too short to gain (below 64)"
    assert report["6"].skipped == "nothing: units are dropped for layer_norm"
    assert report["8"].skipped == "nothing: the rate is 0"
    dense = 64 * 128 + 128 * 128 + 128 * 10
    assert report.saved == report.saved_by(report["2"]) == pytest.approx(0.5 * 128 * 128 / dense)
    assert report.multiplies == 16 * dense


def test_lstm_layers_too_narrow_to_gain_run_the_vendors_kernel_with_a_masked_weight(monkeypatch):
    for least, skipped in (
        (0, "consumers' tiles"),
        (100, "nothing: {}: its hidden size 96 is too small to gain (below 100)"),
    ):
        set_thresholds(monkeypatch, hidden=least)
        model = nn.Sequential(nn.Dropout(0.5), nn.LSTM(64, 96, 2, dropout=0.5))
        report = approximate(model, pattern="tile", seed=0)
        step(model, torch.randn(3, 5, 64))
        assert report["0"].skipped == skipped.format("1")
        assert report["1 (after layer 0)"].skipped == skipped.format("1 (layer 1)")
        assert report.multiplies == 15 * 4 * 96 * (64 + 3 * 96)
        saved = 0.5 * (64 + 96) / (64 + 3 * 96)
        assert report.saved == pytest.approx(0 if least else saved)


@pytest.mark.parametrize("kind", ["tile", "dropconnect"])
def test_restore_gives_the_ordinary_classes_back(kind):
    model = nn.Sequential(mlp(), nn.LSTM(10, 8, 2, dropout=0.5))
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    approximate(model, pattern=kind)
    assert {TileLinear, TileLSTM} <= {type(m) for m in model.modules()}
    restore(model)
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before


@pytest.mark.parametrize("kind", ["tile", "dropconnect"])
def test_evaluation_state_dict_and_global_generator_are_untouched(kind):
    model = nn.Sequential(mlp(), nn.LSTM(10, 8, 2, dropout=0.5))
    stock = copy.deepcopy(model).eval()
    state = torch.get_rng_state()
    approximate(model, **TILE | {"pattern": kind})
    x = torch.randn(4, 3, 20, generator=torch.Generator())
    step(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert torch.equal(model(x)[0], stock(x)[0])
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), stock.state_dict().values(), strict=True)
    )


class Checkpointed(nn.Module):
    """A segment with dropout in it, and one that begins with a layer that reads a dropout before it."""

    def __init__(self, reentrant, inside):
        super().__init__()
        self.net, self.reentrant, self.inside = mlp(), reentrant, inside

    def forward(self, x):
        before, segment = (nn.Identity(), self.net) if self.inside else (self.net[:-1], self.net[-1])
        x = before(x)
        return segment(x) if self.reentrant is None else checkpoint(segment, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("kind", ["tile", "dropconnect"])
@pytest.mark.parametrize(("inside", "ways"), [(True, (None, False, True)), (False, (None, False))])
@pytest.mark.parametrize("fresh", [True, False])
def test_activation_checkpointing_computes_again_with_the_same_patterns(kind, inside, ways, fresh):
    found = []
    for reentrant in ways:
        torch.manual_seed(0)
        model = Checkpointed(reentrant, inside).double()
        approximate(model, **TILE | {"pattern": kind})
        x = torch.randn(5, 20, dtype=torch.float64, requires_grad=True)
        resample(model)
        for _ in range(2):
            if fresh:
                resample(model)
            else:
                conversion_of(model).resample(fresh=False)
            model.zero_grad()
            x.grad = None
            out = model(x) * 1.0
            out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in model.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_units_are_dropped_at_the_border_of_a_reentrant_segment():
    """It hands a dense tensor on when it computes the segment again, so the layer in it cannot drop weights."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    report = approximate(model, **TILE)
    resample(model)
    x = torch.randn(5, 8, dtype=torch.float64)
    checkpoint(model[2], model[1](model[0](x)), use_reentrant=True).square().sum().backward()
    found = [p.grad for p in model.parameters()]
    (pattern,) = report["1"].site.last_patterns
    assert isinstance(pattern, BernoulliPattern)
    restore(model)
    model.zero_grad()
    model[2](model[0](x) * (pattern.mask().double() * 2)).square().sum().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-9)


def test_the_same_patterns_serve_the_batches_of_one_optimizer_step():
    model = mlp()
    report = approximate(model, **TILE)
    step(model, torch.randn(5, 20))
    patterns = [row.site.last_patterns for row in report]
    conversion_of(model).resample(fresh=False)
    model(torch.randn(9, 20)).sum().backward()
    assert [row.site.last_patterns for row in report] == patterns
    step(model, torch.randn(5, 20))
    assert [row.site.last_patterns for row in report] != patterns


def test_an_empty_batch():
    model = mlp()
    approximate(model, **TILE)
    step(model, torch.randn(0, 20))
    assert all(not p.grad.any() for p in model.parameters())


def test_under_torch_compile_values_are_right():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(13, 20)
    eager = copy.deepcopy(model)
    approximate(model, **TILE), approximate(eager, **TILE)
    compiled = torch.compile(model, backend="eager")
    for _ in range(12):
        resample(model), resample(eager)
        torch.testing.assert_close(compiled(x), eager(x))


@pytest.mark.parametrize("kind", ["tile", "dropconnect"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_reentrant_segment_within_another_one_is_refused_with_a_remedy_that_works(kind, reentrant):
    """Its border is seen in the recomputation only: weights were dropped, and units would be."""
    torch.manual_seed(0)
    segment, last = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5)).double(), nn.Linear(6, 3).double()
    model = nn.ModuleList([segment, last])
    approximate(model, **TILE | {"pattern": kind})
    x = torch.randn(5, 8, dtype=torch.float64)

    def loss(*ways):
        conversion_of(model).resample(fresh=False)
        model.zero_grad()
        inner = segment if ways[1] is None else lambda z: checkpoint(segment, z, use_reentrant=ways[1])
        y = x.clone().requires_grad_()
        y = last(inner(y)) if ways[0] is None else checkpoint(lambda z: last(inner(z)), y, use_reentrant=ways[0])
        return y.square().sum()

    resample(model)
    if reentrant:
        with pytest.raises(RuntimeError, match=r"0\.2: .* re-entrant checkpoint .*use_reentrant=False"):
            loss(True, True).backward()
        return
    expected = loss(None, None)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for ways in ((True, False), (False, False)):
        found = loss(*ways)
        found.backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-9)


def test_what_nested_reentrant_segments_hand_to_others_than_layers_has_its_units_dropped():
    torch.manual_seed(0)
    segment = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5)).double()
    report = approximate(segment, **TILE)
    resample(segment)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    out = checkpoint(lambda z: checkpoint(segment, z, use_reentrant=True).square(), x, use_reentrant=True)
    out.sum().backward()
    (pattern,) = report["1"].site.last_patterns
    found = segment[0].weight.grad.clone()
    restore(segment)
    segment.zero_grad()
    expected = (segment[0](x) * (pattern.mask().double() * 2)).square()
    expected.sum().backward()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(found, segment[0].weight.grad, rtol=0, atol=1e-9)
