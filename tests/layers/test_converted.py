"""Converted layers among others: copied, saved, and with whatever else changes a model's layers."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.gallery import EmbeddedLSTM
from torch import nn

from approxdrop_lightning import approximate, resample, restore
from approxdrop_lightning.conversion import NotRestoredWarning
from approxdrop_lightning.layers.converted import Converted


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "old pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("pattern", ["row", "tile"])
@pytest.mark.parametrize("how", [name for name in COPIES if name != "copy"])
def test_a_copy_of_a_converted_model_is_the_stock_model(how, pattern):
    """It can be used, trained and converted; of the original nothing changes."""
    torch.manual_seed(0)
    model, x = EmbeddedLSTM(), torch.randint(30, (4, 3))
    stock = copy.deepcopy(model)
    options = {"min_gain": 0, "pattern_everywhere": True, "seed": 0, "pattern": pattern}
    report = approximate(model, **options)
    resample(model)
    model(x).sum().backward()
    model.zero_grad()
    twin = COPIES[how](model)
    assert [(type(m), set(m.__dict__)) for m in twin.modules()] == [
        (type(m), set(m.__dict__)) for m in stock.modules()
    ]
    with pytest.raises(ValueError, match="not converted"):
        resample(twin)
    for one in (twin, stock):  # conventional dropout
        torch.manual_seed(1)
        one(x).square().sum().backward()
    for a, b in zip(twin.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    again = approximate(twin, **options)
    for one in (model, twin):
        resample(one)
        one(x).sum().backward()
    assert [row.skipped for row in again] == [row.skipped for row in report]
    assert again.saved == report.saved > 0


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_one_converted_layer_is_the_stock_layer(how):
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.LSTM(64, 8))
    approximate(model)
    for layer, kind in zip(model, (nn.Linear, nn.Dropout, nn.LSTM), strict=True):
        assert type(COPIES[how](layer)) is kind
        assert type(layer) is not kind


def test_what_is_saved_whole_loads_where_only_stock_layers_are_allowed():
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    allowed = {type(m) for m in model} | {nn.Sequential, nn.Parameter, set}
    approximate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals(list(allowed)):
        loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded[0].weight, model[0].weight)


def wide():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5))


def skipping(model, report):
    """Whether a step skips something, values and all."""
    resample(model)
    out = model(torch.randn(8, 16))
    out.square().sum().backward()
    return report.saved > 0


def patched(layer):
    """As libraries do that add to a layer's forward in place."""

    class Patched(type(layer)):
        def forward(self, x):
            return super().forward(x) * 2

    layer.__class__ = Patched


@pytest.mark.parametrize("pattern", ["row", "tile"])
def test_a_forward_that_was_wrapped_on_the_layer_works_before_and_after_restoring(pattern):
    """The wrapper holds the bound method of a class that the layer has no longer."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 32), nn.LSTM(32, 8)),
        torch.randn(8, 16),
    )
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0, pattern=pattern, min_gain=0)
    resample(model)
    calls = []
    for layer in model:

        def wrapped(*inputs, inner=layer.forward, layer=layer):
            calls.append(layer)
            return inner(*inputs)

        layer.forward = wrapped

    def passes(training):
        torch.manual_seed(1)
        expected = stock.train(training)(x.unsqueeze(0))[0]
        torch.manual_seed(1)
        calls.clear()
        torch.testing.assert_close(model(x.unsqueeze(0))[0], expected, rtol=0, atol=0)
        assert calls == list(model)

    model(x.unsqueeze(0))[0].sum().backward()
    assert report["1"].skipped != "nothing" and report.saved > 0
    model.eval()
    passes(training=False)
    model.train()
    passes(training=True)  # no step has begun
    resample(model)
    model(x.unsqueeze(0))[0].sum().backward()
    assert type(model[0]) is not nn.Linear and report.saved > 0
    restore(model)
    passes(training=True)


@pytest.mark.parametrize("pattern", ["row", "tile"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity()),
        lambda layer: (patched(layer), patched(layer)),
        lambda layer: (patched(layer), nn.utils.parametrizations.spectral_norm(layer)),
    ],
    ids=["spectral norm", "weight norm", "parametrized", "patched", "patched and parametrized"],
)
def test_restoring_reaches_through_the_classes_that_others_put_on_converted_layers(change, pattern):
    torch.manual_seed(0)
    model = wide()
    report = approximate(model, min_gain=0, pattern_everywhere=True, pattern=pattern)
    for i in (0, 3):
        change(model[i])
    assert skipping(model, report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore(model)
    for layer in model:
        assert not isinstance(layer, Converted)
        assert "Approx" not in repr(type(layer)) and "Tile" not in repr(type(layer))
    model.eval()  # spectral norm iterates in training
    x = torch.randn(5, 16)
    factor = 2 ** sum(c.__name__ == "Patched" for c in type(model[0]).__mro__)
    expected = F.linear(x, model[0].weight, model[0].bias) * factor
    torch.testing.assert_close(model[0](x), expected)
    for layer in model:
        if nn.utils.parametrize.is_parametrized(layer):
            for name in list(layer.parametrizations):
                nn.utils.parametrize.remove_parametrizations(layer, name)
            assert issubclass(type(layer), nn.Linear)
    again = approximate(model.train(), min_gain=0, pattern_everywhere=True, pattern=pattern)
    assert skipping(model, again) or any(type(m).__name__ == "Patched" for m in model)


def test_a_class_that_cannot_be_put_back_is_named_and_its_layer_computes_as_the_stock_one(monkeypatch):
    class Stubborn(type):
        def __setattr__(cls, name, value):
            if name == "__bases__":
                raise TypeError("not this one")
            super().__setattr__(name, value)

    model = wide()
    report = approximate(model, min_gain=0, pattern_everywhere=True)
    model[3].__class__ = Stubborn("Odd", (type(model[3]),), {})
    assert skipping(model, report)
    with pytest.warns(NotRestoredWarning, match=r"3 of the class Odd \(not this one\)"):
        restore(model)
    assert [type(m).__name__ for m in model] == ["Linear", "ReLU", "Dropout", "Odd", "Dropout"]
    x = torch.randn(4, 16)
    torch.manual_seed(0)
    found = model(x)
    torch.manual_seed(0)
    h = F.dropout(F.relu(F.linear(x, model[0].weight, model[0].bias)), 0.5)
    assert type(found) is torch.Tensor
    assert torch.equal(found, F.dropout(F.linear(h, model[3].weight, model[3].bias), 0.5))


@pytest.mark.parametrize("options", [{}, {"pattern": "tile"}, {"recurrent": True}])
def test_a_class_that_is_put_back_after_the_end_does_what_the_stock_one_does(options):
    """By others who had changed it meanwhile: they remember ours."""
    model = nn.ModuleList([nn.Linear(8, 64), nn.Dropout(0.5), nn.LSTM(64, 8, 2, dropout=0.5)])
    stock = copy.deepcopy(model)
    approximate(model, min_gain=0, pattern_everywhere=True, **options)
    classes = [type(m) for m in model]
    restore(model)
    for layer, cls in zip(model, classes, strict=True):
        layer.__class__ = cls
    x = torch.randn(3, 5, 8)
    outputs = []
    for one in (model, stock):
        torch.manual_seed(0)
        outputs.append(one[2](one[1](one[0](x)))[0])
        outputs[-1].sum().backward()
    assert torch.equal(*outputs)
    assert torch.equal(model[0].weight.grad, stock[0].weight.grad)
    assert "Approx" not in str([type(m) for m in copy.deepcopy(model)])
    report = approximate(model, min_gain=0, pattern_everywhere=True, **options)
    assert {row.name for row in report if row.site} >= {"1", "2 (after layer 0)"}
    restore(model)
    assert [type(m) for m in model] == [type(m) for m in stock]


def test_layers_that_were_replaced_or_removed_are_restored_for_who_holds_them():
    model = wide()
    report = approximate(model, min_gain=0, pattern_everywhere=True)
    first, last = model[0], model[3]
    model[0] = nn.Sequential(first, nn.Identity())  # as adapters do
    model[3] = nn.Linear(64, 64)
    assert skipping(model, report)
    del model[4]
    restore(model)
    assert type(first) is type(last) is nn.Linear
    assert all(not isinstance(m, Converted) for m in model.modules())


def test_what_outlives_its_converted_model_is_stock_and_can_be_converted():
    model = wide()
    approximate(model, min_gain=0, pattern_everywhere=True)
    layers = list(model)
    del model
    gc.collect()
    x, outputs = torch.randn(4, 16), []
    for net in (nn.Sequential(*layers), copy.deepcopy(nn.Sequential(*layers))):
        torch.manual_seed(0)
        outputs.append(net(x))
    assert torch.equal(*outputs)
    net = nn.Sequential(*layers)
    assert skipping(net, approximate(net, min_gain=0, pattern_everywhere=True))


def test_a_layer_of_a_model_that_is_converted_still_is_refused_by_name():
    model = wide()
    approximate(model)
    other = nn.ModuleDict({"head": nn.Linear(16, 16), "shared": model[3]})
    with pytest.raises(ValueError, match=r"'shared' is part of another converted model; restore\(that model\) first"):
        approximate(other)
    assert type(other["head"]) is nn.Linear
    restore(model)
    approximate(nn.ModuleList([other["shared"], nn.Dropout(0.5)]))


def test_a_model_wrapped_by_compile_is_the_model():
    model = wide()
    approximate(model, min_gain=0, pattern_everywhere=True)
    compiled = torch.compile(model, backend="eager")
    resample(compiled)
    with pytest.raises(ValueError, match="converted already"):
        approximate(compiled)
    restore(compiled)
    assert type(model[0]) is nn.Linear


def test_a_converted_model_is_not_kept_alive():
    models = wide(), nn.Dropout(0.5)
    references = [weakref.ref(model) for model in models]
    for model in models:
        approximate(model)
        resample(model)
    del model, models
    gc.collect()
    assert [reference() for reference in references] == [None, None]
