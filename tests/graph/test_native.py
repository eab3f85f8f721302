"""Compiled graphs in which no dropout skips: they are those of the stock model, and nothing is drawn for them."""

import pytest
import torch
from support.calls import calls_into_package
from support.compiled import rewriting
from torch import nn
from torch._dynamo.utils import counters

from approxdrop_lightning import approximate, resample, restore
from approxdrop_lightning.conversion import conversion_of
from approxdrop_lightning.graph.counts import COUNTS

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def mlp(width=64, rate=0.3):
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(rate), nn.Linear(width, width), nn.Dropout(rate),
        nn.Linear(width, 2),
    )  # fmt: skip


def test_nothing_is_drawn_and_nothing_recompiles():
    """At .3, four pairs would be drawn, with a graph for each."""
    model, x = mlp(), torch.randn(16, 64)
    report = approximate(model, seed=0)
    compiled = torch.compile(model, backend=rewriting, fullgraph=True)
    conversion = conversion_of(model)
    resample(model, x)
    compiled(x).sum().backward()
    resample(model, x)  # decides
    table, (sampler,) = conversion.book.table(x.device), conversion.samplers.values()
    before = table._version, sampler.seed_of_step
    for number in range(100):
        if number == 50:  # as after validation
            model.eval()
            model.train()
        with calls_into_package() as calls:
            resample(model, x)
        assert not [call for call in calls if call.startswith(("book.py", "sampler.py", "site.py"))]
        with calls_into_package() as calls:
            compiled(x).sum().backward()
        assert not calls
    assert (table._version, sampler.seed_of_step) == before
    assert counters["stats"]["unique_graphs"] == 1 and COUNTS.native == 2
    assert all("too few to gain" in row.skipped for row in report)
    restore(model)


def test_a_larger_batch_may_skip_again():
    model = mlp(256, 0.5)
    report = approximate(model, seed=0, concentration=float("inf"))
    compiled = torch.compile(model, backend=rewriting)
    (sampler,) = conversion_of(model).samplers.values()
    seeds = []
    for rows in (8, 8, 8, 128, 128, 128):
        x = torch.randn(rows, 256)
        resample(model, x)
        compiled(x).sum().backward()
        seeds.append(sampler.seed_of_step)
    assert (COUNTS.native, COUNTS.producers, COUNTS.consumers) == (2, 2, 2)
    assert len(set(seeds)) == 3  # the first step draws, and those after the first large batch
    assert report[0].skipped == "producer's rows and consumers' columns"
    restore(model)


def test_the_rate_holds_if_the_pair_keeps_everything():
    """The pairs of .05 include one without dropped cells; native dropout must not skip the dropping with it."""
    model, x = nn.Sequential(nn.Linear(8, 100), nn.Dropout(0.05), nn.Linear(100, 100)), torch.ones(1000, 8)
    report = approximate(model, seed=0)
    book = conversion_of(model).book
    for _ in range(1000):
        resample(model)
        dp, keep = book.pair(report.sites[0])
        if dp == keep:
            break
    assert dp == keep
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.eye_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    y = torch.compile(model, backend=rewriting)(x)
    assert COUNTS.native == 1
    assert (y == 0).double().mean().item() == pytest.approx(0.05, abs=0.005)
    restore(model)


def test_one_dropout_that_skips_is_drawn_for_alone():
    """The pairs of a native dropout cause no graphs of their own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Dropout(0.5), nn.Dropout(0.3)
            self.a, self.b, self.c = nn.Linear(64, 512), nn.Linear(512, 64), nn.Linear(64, 2)

        def forward(self, x):
            return self.c(self.narrow(self.b(self.wide(self.a(x)))))

    model, x = Net(), torch.randn(256, 64)
    report = approximate(model, seed=0)
    book, compiled = conversion_of(model).book, torch.compile(model, backend=rewriting)
    pairs = set()
    for _ in range(60):
        resample(model, x)
        pairs.add(book.pair(report["wide"].site))
        compiled(x).sum().backward()
    assert len(report["wide"].site.last_patterns) == 1 and report["wide"].site.producers
    assert counters["stats"]["unique_graphs"] == len(pairs) > 1
    assert "too few" in report["narrow"].skipped
    restore(model)
