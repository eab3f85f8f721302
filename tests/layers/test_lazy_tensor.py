"""Outputs that are computed when they are read: changes in place, and autocast."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.twin import twin
from torch import nn

from approxdrop_lightning import approximate, resample


@pytest.mark.parametrize("changed", ["weight", "input"])
def test_what_a_pending_output_needs_must_not_change_before_it_is_read(changed):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    approximate(model)
    x = torch.randn(2, 4)
    out = model[0](x)
    with torch.no_grad():
        (model[0].weight if changed == "weight" else x).mul_(2)
    with pytest.raises(RuntimeError, match="after its input or parameters were"):
        out.sum()


@pytest.mark.parametrize("change", [lambda h: F.relu(h, inplace=True), lambda h: h.mul_(3), lambda h: h.__iadd__(1)])
@pytest.mark.parametrize("whose", ["view", "base"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_change_in_place_is_seen_by_all_views(change, whose, layers):
    """Of a waiting output (one layer) and of a dropped-out one (two)."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.drop, self.down = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)

        def forward(self, x):
            base = self.up(x) if layers == 1 else self.drop(self.up(x))
            view = base.view(-1, 8)
            changed = change(view if whose == "view" else base)
            parts = [changed, base, view] if layers == 2 else [self.drop(changed), base, view]
            return torch.cat([self.down(part).flatten() for part in parts])

    torch.manual_seed(0)
    model, x = Views().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    stock = copy.deepcopy(model)
    report = approximate(model, min_gain=0)
    resample(model)
    found = model(x)
    expected = twin(stock, report)(x)
    torch.testing.assert_close(found * 1.0, expected, rtol=0, atol=1e-9)
    expected.square().sum().backward(), found.square().sum().backward()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        torch.tanh,
        lambda h: torch.cat([h, h * 2], -1),
        lambda h: h + h.relu(),
        lambda h: torch.stack([h, h.relu()]).flatten(),
    ],
    ids=["elementwise", "cat", "sum", "stack"],
)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_change_in_place_is_not_seen_by_what_was_made_before(make, layers):
    """Of a waiting output (one layer) and of a dropped-out one (two)."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)).double(), torch.randn(5, 6, dtype=torch.float64)
    stock = copy.deepcopy(model)
    report = approximate(model, min_gain=0)
    resample(model)
    found = []
    for net in (model, stock):
        h = net[:layers](x)
        assert net is stock or h.is_lazy
        made = make(h)
        h.add_(1.0)
        found.append(made * 1.0)
        found[-1].square().sum().backward()
        twin(stock, report)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_a_function_outside_of_the_layers_autocast_is_not_drawn_into_it():
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5))
    approximate(model, seed=0)
    resample(model)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model[0](x)
        low = inside.relu()
        widened = inside.exp()
    high = torch.exp(inside)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.linear(x, model[0].weight, model[0].bias)
        expected = [plain, plain.relu(), plain.exp()]
    for lazy, eager in zip([inside, low, widened, high], [*expected, torch.exp(plain)], strict=True):
        assert lazy.dtype == eager.dtype == (lazy * 1).dtype
        assert torch.equal(torch.as_tensor(lazy * 1), eager)
    dropped = model[1](low)
    assert dropped.dtype == (dropped * 1).dtype == torch.bfloat16
