"""Layers beside a dropout are one node of the graph each, where the compact backend computes them as they are."""

import pytest
import torch
from support.skipping import assert_skips
from torch import nn

from approxdrop_lightning import approximate, resample


def nodes_of(tensor):
    """Names of the nodes that a tensor was made by."""
    found, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [before for before, _ in node.next_functions]
    return sorted(node.name() for node in found)


@pytest.mark.parametrize(
    ("activation", "options", "counts"),
    [
        (nn.ReLU(), {}, (1, 1)),
        (nn.Identity(), {}, (1, 1)),
        (nn.ReLU(), {"interleave": False}, (1, 1)),
        (nn.GELU(), {}, (0, 1)),  # its derivative needs its input
        (nn.ReLU(), {"backend": "reference"}, (0, 0)),
    ],
)
@pytest.mark.parametrize("leading", [(8,), (3, 4)])
def test_nodes(activation, options, counts, leading):
    """Against the masked product, with gradients of all parameters and of the input."""
    model = nn.Sequential(nn.Linear(12, 32), activation, nn.Dropout(0.5), nn.Linear(32, 5))
    report = approximate(model, seed=0, min_gain=0, **options)
    resample(model)
    x = torch.randn(*leading, 12, requires_grad=True)
    y = model(x)
    names = nodes_of(y)
    assert (names.count("KeptLinearBackward"), names.count("KeptInputsBackward")) == counts
    mask = model[2].last_patterns[0].mask(*leading).float() * 2
    wanted = model[3].forward(activation(torch.nn.functional.linear(x, model[0].weight, model[0].bias)) * mask)
    direction = torch.randn(y.shape)
    torch.testing.assert_close(y, wanted)
    parameters = [x, *model.parameters()]
    found, expected = (torch.autograd.grad(result, parameters, direction) for result in (y, wanted))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert_skips(report)


def test_a_wrong_width_is_an_error_of_the_layer():
    model = nn.Sequential(nn.Dropout(0.5))
    approximate(model, seed=0, min_gain=0)
    resample(model)
    dropped = model(torch.randn(4, 8, requires_grad=True))
    with pytest.raises(ValueError, match="in_pattern is of 8 units, the weight has 7"):
        nn.functional.linear(dropped, torch.randn(3, 7))


def test_autocast_is_composed_of_several_nodes():
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5))
    report = approximate(model, seed=0, min_gain=0)
    resample(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(8, 12))
    assert y.dtype == torch.bfloat16 and not {"KeptLinearBackward", "KeptInputsBackward"} & set(nodes_of(y))
    assert_skips(report)
