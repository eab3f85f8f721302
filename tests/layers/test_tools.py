"""To tools that trace, script, save or rewrite a model, a converted one is the stock model."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import linearize
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from approxdrop_lightning import approximate, resample
from approxdrop_lightning.layers.converted import Converted
from approxdrop_lightning.layers.lazy_tensor import LazyTensor

ALL = {"min_gain": 0, "pattern_everywhere": True}


def trained(*layers):
    model = nn.Sequential(*layers)
    report = approximate(model, seed=0, **ALL)
    resample(model)
    model(torch.randn(5, 20)).sum().backward()
    assert report.sites[0].consumers
    return model


def a_model():
    return trained(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("training", [True, False])
def test_torch_jit_script_compiles_the_stock_model(training):
    model = a_model().train(training)
    script = torch.jit.script(model)
    x = torch.randn(5, 20)
    assert torch.equal(script.eval()(x), model.eval()(x))
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    model.train()
    resample(model)
    assert isinstance(model[0](x), LazyTensor)


#: What makes another module of a model in training mode, given an input.
TRACES = {
    "torch.jit.trace": lambda m, x: torch.jit.trace(m, x, check_trace=False),
    "torch.fx": lambda m, x: symbolic_trace(m),
    "make_fx": lambda m, x: make_fx(m)(x),
    "torch.export": lambda m, x: torch.export.export(m, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("pattern", ["row", "tile", "dropconnect"])
@pytest.mark.parametrize("how", TRACES)
def test_a_trace_in_training_mode_is_one_of_the_stock_model(how, pattern):
    model, x = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4)), torch.randn(5, 20)
    stock = copy.deepcopy(model)
    approximate(model, seed=0, pattern=pattern, **ALL)
    resample(model)
    torch.manual_seed(1)
    expected = stock(x)
    traced = TRACES[how](model, x)
    torch.manual_seed(1)
    torch.testing.assert_close(traced(x), expected, rtol=0, atol=0)
    assert any(isinstance(m, Converted) for m in model.modules())
    y = model(x)
    y.sum().backward()
    assert model[2].site.last_patterns  # which the next step goes on drawing


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("pattern", ["row", "tile"])
def test_traces_of_an_lstm_are_the_stock_ones_or_refused(pattern):
    model, x = nn.Sequential(nn.Linear(20, 32), nn.Dropout(0.5), nn.LSTM(32, 4)), torch.randn(5, 3, 20)
    stock = copy.deepcopy(model)
    approximate(model, seed=0, pattern=pattern, **ALL)
    resample(model)
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.manual_seed(1)
    expected = stock(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(traced(x)[0], expected)
    with pytest.raises(RuntimeError, match=r"2: torch\.fx does not trace a converted nn\.LSTM in training mode"):
        symbolic_trace(model)
    symbolic_trace(model.eval())


def test_torch_compile_of_the_evaluation_mode_has_one_graph():
    torch._dynamo.reset()
    model, x = trained(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4)).eval(), torch.randn(5, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.parametrize("inplace", [True, False])
def test_quantize_dynamic_finds_the_linear_layers(inplace):
    model = a_model()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=inplace)
    assert [type(m).__name__ for m in quantized] == ["Linear", "ReLU", "Dropout", "Linear"]
    assert all("quantized" in type(quantized[i]).__module__ for i in (0, 3))
    assert quantized(torch.randn(5, 20)).shape == (5, 4)


@pytest.mark.parametrize("training", [True, False])
def test_what_is_saved_loads_with_the_stock_classes_alone(training):
    model = a_model().train(training)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    allowed = [nn.Sequential, nn.Linear, nn.ReLU, nn.Dropout, set]
    with torch.serialization.safe_globals(allowed):
        loaded = torch.load(buffer, weights_only=True)
    x = torch.randn(5, 20)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize("pattern", ["row", "tile", "dropconnect"])
def test_tensors_without_values_pass_through_the_stock_model(pattern):
    """As estimators of memory do it; a pattern cannot be drawn there."""
    model = nn.Sequential(nn.Linear(20, 32), nn.Dropout(0.5), nn.LSTM(32, 8, 2, dropout=0.5))
    report = approximate(model, seed=0, pattern=pattern, **ALL)
    resample(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        y = model(fakes.from_tensor(torch.randn(5, 3, 20)))[0]
        y.sum().backward()
    assert y.shape == (5, 3, 8) and not report["1"].site.last_patterns
    model.zero_grad()
    model(torch.randn(5, 3, 20))[0].sum().backward()
    assert report["1"].site.last_patterns


def test_linearizing_traces_the_stock_model():
    """``torch.func.linearize`` evaluates a function first, by a pattern here, and then traces its derivative."""
    model, x = nn.Sequential(nn.Linear(20, 32), nn.Dropout(0.5), nn.Linear(32, 4)), torch.randn(5, 20)
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0, **ALL)
    resample(model)
    found = []
    for function in (stock, model):
        _, tangent = linearize(function, x)
        torch.manual_seed(1)
        found.append(tangent(x))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert len(report["1"].site.last_patterns) == 1
