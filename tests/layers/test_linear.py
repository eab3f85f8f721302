"""Linear layers beside a dropout: when they wait for it, and when they skip."""

import copy

import pytest
import torch
from support.flops import Flops
from support.gallery import mlp
from torch import nn

from approxdrop_lightning import ApproxLinear, approximate, resample
from approxdrop_lightning.layers import ApproxDropoutSite
from approxdrop_lightning.layers.pending import PendingLinear


def test_a_product_too_small_to_gain_is_that_of_stock_layers():
    """A site may be reached by batches of several sizes: by small ones it is stock dropout, from the first on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 8))
    stock = copy.deepcopy(model)
    report = approximate(model, min_gain=16 * 64 * 96 // 2, seed=0)
    for rows, small in ((15, True), (16, False), (15, True)):
        resample(model)
        x = torch.randn(rows, 64)
        torch.manual_seed(1)
        with Flops() as counter:
            y = model(x).clone()  # read: it waits otherwise
        if small:
            torch.manual_seed(1)
            assert torch.equal(y, stock(x))
            assert not model[2].last_patterns
        else:
            (pattern,) = model[2].last_patterns
            torch.testing.assert_close(y, stock[3](stock[1](stock[0](x)) * (pattern.mask(rows) * 2.0)))
        assert counter.total == (1 if small else 0.5) * 2 * rows * (64 * 96 + 96 * 8)
        if rows == 15 and not report["2"].producer:
            assert report["2"].skipped == "nothing: 46,080 multiplies saved are too few to gain (fewer than 49,152)"
    assert report["2"].skipped == "producer's rows and consumers' columns"


@pytest.mark.parametrize(
    ("widths", "executed"), [((8, 64, 256), (1, 0.5)), ((256, 64, 8), (0.5, 0.5)), ((8, 64, 8), (1, 1))]
)
def test_each_layer_beside_a_dropout_skips_where_that_saves_enough(widths, executed):
    n_in, n, n_out = widths
    model = nn.Sequential(nn.Linear(n_in, n), nn.ReLU(), nn.Dropout(0.5), nn.Linear(n, n_out))
    stock = copy.deepcopy(model)
    approximate(model, min_gain=16 * 64 * 64, seed=0)
    x = torch.randn(16, n_in)
    for _ in range(3):  # from the second step on small layers do not wait
        resample(model, x)
        with Flops() as counter:
            y = model(x).clone()
        assert counter.total == 2 * 16 * n * (n_in * executed[0] + n_out * executed[1])
        if min(executed) < 1:
            mask = model[2].last_patterns[0].mask(16) * 2.0
            torch.testing.assert_close(y, stock[3](stock[1](stock[0](x)) * mask))
    assert isinstance(model[0](x), PendingLinear) == (executed[0] < 1)
    assert isinstance(model[2], ApproxDropoutSite) == (min(executed) < 1)


def test_a_linear_layer_that_feeds_no_site_stops_waiting():
    model = mlp()
    approximate(model, min_gain=0)
    x = torch.randn(4, 20)
    for _ in range(2):
        resample(model, x)
        model(x).sum().backward()
    defers = {m.name: m.defers for m in model.modules() if isinstance(m, ApproxLinear)}
    assert defers == {"1.0": True, "2": True, "5": False}  # the last one reads kept units


def test_a_linear_layer_that_is_read_whole_as_well_stops_waiting():
    """It would compute its kept units once more."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.drop, self.down = nn.Linear(20, 64), nn.Dropout(0.5), nn.Linear(64, 20)

        def forward(self, x):
            hidden = self.up(x).tanh()
            return self.down(self.drop(hidden)).square().sum() + hidden.square().sum()

    model = Both()
    with Flops() as dense:
        model(torch.randn(4, 20))
    report = approximate(model, min_gain=0, seed=0)
    for step in range(3):
        resample(model)
        with Flops() as executed:
            model(torch.randn(4, 20)).backward()
            if step:
                assert executed.total == pytest.approx(
                    0.75 * 3 * dense.total - 2 * 4 * 20 * 64
                )  # x needs no gradient
    assert report["drop"].skipped == "consumers' columns"
    assert report.saved == pytest.approx(0.25)


def test_the_paper_setting_goes_on_waiting_where_the_first_step_drops_nothing():
    model = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.5), nn.Linear(64, 2))
    report = approximate(model, interleave=False, shuffle=False, keep="one", concentration=0.0, min_gain=0, seed=0)
    sampler = report["1"].site.sampler
    while sampler.dp > 1:  # until the next step is such a one
        state = sampler.state_dict()
        sampler.draw()
    sampler.load_state_dict(state)
    for _ in range(9):
        resample(model)
        model(torch.randn(4, 20)).sum().backward()
    assert report.saved == pytest.approx(0.5)


def test_functional_call_reads_the_parameters_that_it_was_given():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    approximate(model, min_gain=0)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    resample(model)
    assert not torch.func.functional_call(model, zeros, (torch.randn(2, 4),)).any()
