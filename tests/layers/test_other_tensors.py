"""Inputs that are no ordinary tensors: nested, sparse, of a class of others', or made in inference mode."""

import copy

import pytest
import torch
from support.skipping import assert_skips
from support.twin import twin
from torch import Tensor, nn

from approxdrop_lightning import approximate, resample

PATTERNS = ("row", "tile", "dropconnect")


class Tagged(Tensor):
    """Keeps its class through functions, as subclasses do by default."""


SEQUENCES = [torch.randn(3, 20), torch.randn(5, 20)]
#: What becomes of an ordinary tensor's rows, and back.
KINDS = {
    "nested": (lambda: torch.nested.nested_tensor(SEQUENCES), lambda y: torch.cat(y.unbind())),
    "jagged": (lambda: torch.nested.nested_tensor(SEQUENCES, layout=torch.jagged), lambda y: y.values()),
    "Tagged": (lambda: torch.cat(SEQUENCES).as_subclass(Tagged), lambda y: y),
    "sparse": (lambda: torch.cat(SEQUENCES).relu().to_sparse(), lambda y: y),
    "sparse rows": (lambda: torch.cat(SEQUENCES).relu().to_sparse_csr(), lambda y: y),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", [{}, {"min_gain": 0}])
@pytest.mark.parametrize("kind", list(KINDS))
def test_tensors_of_other_kinds_are_computed_by_the_stock_layers(kind, options, pattern):
    make, rows = KINDS[kind]
    model = nn.Sequential(nn.Linear(20, 160), nn.ReLU(), nn.Dropout(0.5), nn.Linear(160, 4))
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0, pattern=pattern, **options)
    for _ in range(2):
        results = []
        for net in (stock, model):
            resample(model)
            net.zero_grad()
            torch.manual_seed(0)
            hidden = net[1](net[0](make()))
            if kind.startswith("sparse"):  # what a layer makes of it is dense
                hidden = hidden.clone()
                results.append([hidden])
            else:
                y = rows(net[3](net[2](hidden)))
                y.square().sum().backward()
                results.append([y, *(p.grad for p in net.parameters())])
                assert type(y) is (Tagged if kind == "Tagged" else Tensor)
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    if not kind.startswith("sparse"):
        name = "nested" if kind == "jagged" else kind
        assert report["2"].skipped == f"nothing: conventional dropout of {name} tensors"
    resample(model)
    model(torch.randn(8, 20)).sum().backward()
    if options and pattern != "dropconnect":
        assert_skips(report, "2")


@pytest.mark.parametrize("pattern", ["row", "tile"])
def test_training_mode_in_inference_mode_draws_patterns(pattern):
    """As under ``no_grad``, such as the rollouts of reinforcement learning."""
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.5), nn.LSTM(32, 16, 2, dropout=0.5)).double()
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0, min_gain=0, pattern=pattern)
    for _ in range(2):
        resample(model)
        with torch.inference_mode():
            x = torch.randn(5, 3, 20, dtype=torch.float64)
            found = model(x)[0] * 1.0
        expected = twin(copy.deepcopy(stock), report)(x.clone())[0]
        torch.testing.assert_close(found.clone(), expected.detach(), rtol=0, atol=1e-9)
        resample(model)
        model(x.clone())[0].sum().backward()
    assert_skips(report, "2")
