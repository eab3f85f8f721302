"""Converted models against masked ones: outputs, all gradients, evaluation and the state dict."""

import copy

import pytest
import torch
import torchvision
from support.gallery import GALLERY
from support.twin import twin
from torch import nn

from approxdrop_lightning import approximate, resample, restore

SETTINGS = {
    "default": {},
    "paper": {"interleave": False, "shuffle": False, "keep": "one", "concentration": 0.0},
    "shared shuffled": {"interleave": False},
    "interleaved regular, .7": {"shuffle": False, "rate": 0.7},
    "several kept of dp": {"rate": 0.3, "block_size": 1},
    "scale dp": {"scale": "dp", "rate": 0.7},
    "reference": {"backend": "reference"},
    "masked": {"min_gain": 1 << 60},
    "masked before an LSTM": {"min_hidden": 1000},
    "recurrent": {"recurrent": True},
    "tile": {"pattern": "tile", "tile_size": 2},
    "tile, .7": {"pattern": "tile", "tile_size": 1, "rate": 0.7},
    "tile, one kept of dp, any dp": {"pattern": "tile", "keep": "one", "concentration": 0.0},
    "tile, scale dp": {"pattern": "tile", "scale": "dp", "rate": 0.7},
    "tile, reference": {"pattern": "tile", "backend": "reference"},
    "tile, masked": {"pattern": "tile", "min_gain": 1 << 60},
    "tile, masked before an LSTM": {"pattern": "tile", "min_hidden": 1000},
    "dropconnect": {"pattern": "dropconnect"},
    "recurrent, all shared, .7": {"recurrent": True, "interleave": False, "rate": 0.7, "shuffle": False},
}


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", list(GALLERY))
def test_outputs_and_all_gradients_are_those_of_the_masked_model(name, setting):
    torch.manual_seed(0)
    make, make_input = GALLERY[name]
    model, x = make().double(), make_input()
    x = x.double() if x.is_floating_point() else x
    stock = copy.deepcopy(model)
    report = approximate(model, seed=1, **{"min_gain": 0, "pattern_everywhere": True, **SETTINGS[setting]})
    for step in range(4):
        resample(model)
        inputs = [t.clone().requires_grad_() if t.is_floating_point() else t for t in (x, x)]
        model.zero_grad()
        found = model(inputs[0]) * 1.0  # read, so that all patterns are drawn
        masked = twin(copy.deepcopy(stock), report)
        expected = masked(inputs[1]) * 1.0
        direction = torch.randn(expected.shape, dtype=torch.float64)
        (found * direction).sum().backward()
        (expected * direction).sum().backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        gradients = dict(masked.named_parameters())
        for key, parameter in model.named_parameters():
            twin_key = next(k for k in gradients if k == key or k == key.replace("lstm.", "lstm.lstm."))
            torch.testing.assert_close(
                parameter.grad, gradients[twin_key].grad, rtol=0, atol=1e-9, msg=f"{step} {key}"
            )
        if x.is_floating_point():
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", list(GALLERY))
def test_evaluation_and_state_dict_are_untouched(name):
    torch.manual_seed(0)
    make, make_input = GALLERY[name]
    model, x = make().double(), make_input()
    x = x.double() if x.is_floating_point() else x
    stock = copy.deepcopy(model)
    approximate(model, min_gain=0, pattern_everywhere=True)
    resample(model)
    model(x)
    model.eval(), stock.eval()
    assert torch.equal(model(x), stock(x))
    expected = stock.state_dict()
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in stock.named_modules()]


@pytest.mark.parametrize("pattern", ["row", "tile"])
def test_layers_take_the_arguments_of_the_stock_layers_by_name(pattern):
    model = nn.ModuleDict({"linear": nn.Linear(8, 128), "drop": nn.Dropout(0.5), "lstm": nn.LSTM(128, 64)})
    x = torch.randn(3, 2, 8)
    approximate(model, pattern=pattern, seed=0)
    for mode in (True, False):
        model.train(mode)
        resample(model)
        y, (h, _) = model["lstm"](input=model["drop"](input=model["linear"](input=x)), hx=None)
        torch.testing.assert_close(y[-1], h[0])


@pytest.mark.parametrize("name", ["alexnet", "vgg11"])
def test_torchvision_classifier_heads(name):
    """The published networks themselves, on small images; float32, for their size."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    model.features.requires_grad_(False)
    report = approximate(model, seed=0)
    resample(model)
    x = torch.randn(4, 3, 80, 80)
    found = model(x)
    found.square().sum().backward()
    gradients = [p.grad for p in model.classifier.parameters()]
    assert all("consumers' columns" in row.skipped for row in report)
    assert report[-1].producer == report[-2].consumers[0]
    assert 0.05 < report.saved < 0.5
    restore(model)
    model.zero_grad()
    expected = twin(model, report)(x)
    expected.square().sum().backward()
    torch.testing.assert_close(torch.as_tensor(found * 1.0), expected)
    for gradient, parameter in zip(gradients, model.classifier.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
