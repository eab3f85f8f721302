"""Where nothing is skipped, stock dropout runs: when that is decided, and that nothing of the package is left."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from support.calls import calls_into_package
from support.compiled import rewriting
from support.gallery import GALLERY, EmbeddedLSTM
from support.skipping import assert_skips, set_thresholds
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from approxdrop_lightning import ApproxDropout, approximate, resample
from approxdrop_lightning.conversion import conversion_of
from approxdrop_lightning.layers import ApproxDropoutSite, ApproxLinear
from approxdrop_lightning.layers.converted import Converted
from approxdrop_lightning.settling import _covers, shapes_of


def converted(model):
    return [name for name, module in model.named_modules() if isinstance(module, Converted)]


def step(model, x):
    model.zero_grad()
    resample(model, x)
    y = model(x)
    y.square().mean().backward()
    return y.detach()


class Attention(nn.Module):
    """Dropout of scores, which no layer reads, beside a block that skips."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.qkv, self.scores = nn.Linear(64, 192), nn.Dropout(rate)
        self.up, self.drop, self.down = nn.Linear(64, 256), nn.Dropout(rate), nn.Linear(256, 64)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        self.dropped = self.scores((q @ k.mT / 8).softmax(-1))
        x = x + self.dropped @ v
        return x + self.down(self.drop(self.up(x).relu()))


#: The stock model raises: a result of an in-place ReLU is dropped from in place.
IN_PLACE = ("in place",)


@pytest.mark.parametrize("name", [name for name in GALLERY if name not in IN_PLACE])
def test_small_networks_are_the_stock_ones(name):
    """Bit for bit, from the first step on: sizes alone say that nothing is to gain, and no pattern is drawn."""
    torch.manual_seed(0)
    make, make_input = GALLERY[name]
    model, x = make(), make_input()
    x = x.float() if x.is_floating_point() else x
    if isinstance(getattr(model, "state", None), tuple):
        model.state = tuple(s.float() for s in model.state)
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0)
    for number in range(3):
        torch.manual_seed(number)
        found = step(model, x)
        torch.manual_seed(number)
        stock.zero_grad()
        expected = stock(x)
        expected.square().mean().backward()
        if number:  # the first one decides: an LSTM runs layer by layer, and draws in another order
            assert torch.equal(found, expected)
            for (key, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
                assert p.grad is None or torch.equal(p.grad, q.grad), key
        assert not any(row.site.last_patterns for row in report if row.site)
        resample(model, x)
        assert not converted(model)
    assert report.saved == 0 and all("nothing: " in row.skipped for row in report)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (
            lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)),
            torch.randn(16, 64),
        ),
        (Attention, torch.randn(2, 8, 64)),
        (EmbeddedLSTM, torch.randint(30, (7, 5))),
    ],
    ids=["mlp", "attention", "lstm"],
)
def test_no_python_of_the_package_runs_in_a_step_of_stock_sites(make, x):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    approximate(model, seed=0)
    counts = []
    for _ in range(3):
        resample(model, x)
        with calls_into_package() as calls:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        counts.append(len(calls))
    assert counts[0] > 0 and counts[1:] == [0, 0], calls[:9]


def test_nothing_is_drawn_for_stock_sites():
    model, x = nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5), nn.Linear(20, 2)), torch.randn(4, 20)
    approximate(model, seed=0)
    step(model, x)
    (sampler,) = conversion_of(model).samplers.values()
    before = sampler.seed_of_step
    for _ in range(3):
        step(model, x)
    assert sampler.seed_of_step == before


def test_a_dropout_that_no_layer_reads_is_stock_after_the_first_step_beside_others_that_skip():
    model, x = Attention(), torch.randn(2, 8, 64)
    report = approximate(model, seed=0, min_gain=0)
    step(model, x)
    assert isinstance(model.scores, ApproxDropoutSite) and report["scores"].site.last_patterns
    for _ in range(3):
        step(model, x)
        assert type(model.scores) is nn.Dropout and type(model.qkv) is nn.Linear
        assert isinstance(model.drop, ApproxDropoutSite) and isinstance(model.up, ApproxLinear)
        assert not report["scores"].site.last_patterns and report["drop"].site.last_patterns
    assert_skips(report, "drop")
    assert report["scores"].skipped == "nothing: no linear layer before it, and read whole by matmul"


@pytest.mark.parametrize("everywhere", [False, True])
def test_masks_of_scores_have_independent_rows(everywhere):
    """As stock dropout has; with ``pattern_everywhere`` the test finds the rows that are alike.

    For independent entries, the number of entries that two rows both keep is binomial. Of 12,000 pairs of rows one is
    beyond 6 standard deviations with a probability below 12,000 * 2e-9 = 2.4e-5 (normal tail).
    """
    torch.manual_seed(0)
    model, x = Attention(rate=0.3), torch.randn(2, 300, 64)
    approximate(model, seed=0, min_gain=0, pattern_everywhere=everywhere)
    for _ in range(2):
        resample(model, x)
        model(x).sum().backward()
    mask = (model.dropped * 1.0 != 0).view(600, 300).double()
    both = 0.7**2
    kept = torch.stack([(mask * mask.roll(lag, 0)).sum(1) for lag in range(1, 21)])
    z = (kept - 300 * both) / math.sqrt(300 * both * (1 - both))
    assert (z.abs().max() > 6) == everywhere
    assert mask.unique(dim=0).shape[0] == 600 or everywhere


def test_a_larger_batch_is_looked_at_and_a_smaller_one_is_not():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 8))
    report = approximate(model, min_gain=16 * 64 * 96 // 2, seed=0)
    for rows, skips in ((15, False), (9, False), (15, False), (16, True), (12, True), (40, True)):
        x = torch.randn(rows, 64)
        step(model, x)
        assert bool(report["2"].site.last_patterns) == (rows >= 16)
        resample(model, x)
        assert bool(converted(model)) == skips
    assert_skips(report, "2")
    found = {shape[0][0]: use.skips for shape, use in report["2"].site.uses.items()}
    assert found == {15: False, 16: True, 12: False, 40: True}  # of 9 rows nothing of ours was run


def test_without_a_batch_the_first_steps_are_looked_at_ever_more_rarely():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 8))
    approximate(model, min_gain=16 * 64 * 96 // 2, seed=0)
    watched = []
    for number in range(1, 18):
        resample(model)
        if converted(model):
            watched.append(number)
        model(torch.randn(15 if number < 16 else 16, 64)).sum().backward()
    assert watched == [1, 2, 4, 8, 16, 17]


def test_a_saving_must_outweigh_what_reading_the_output_whole_costs(monkeypatch):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(64, 64), nn.Dropout(0.5)

        def forward(self, x):
            return x + self.drop(self.layer(x))

    x = torch.randn(16, 64)
    for cost, skips in ((32, True), (33, False)):  # 16 * 64 * 64 / 2 multiplies, and 16 * 64 values
        set_thresholds(monkeypatch, whole=cost, residual=True)
        model = Residual()
        report = approximate(model, seed=0)
        step(model, x)
        step(model, x)
        assert bool(converted(model)) == skips
        reason = "32,768 multiplies saved are fewer than those that reading 1,024 values whole costs (33,792)"
        expected = "producer's rows; read whole by add" if skips else f"nothing: {reason}"
        assert report["drop"].skipped == expected


def test_what_was_beside_a_site_that_has_become_stock_is_looked_at_again(monkeypatch):
    """Side by side both save enough for the reader; one alone is read whole by ``torch.cat``."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(128, 32)

        def forward(self, x):
            dropped = self.b(x)
            return self.out(torch.cat([self.a(x), dropped], -1)) + dropped.repeat(1, 9)[:, :32].sum() * 0

    x = torch.randn(16, 64)
    set_thresholds(monkeypatch)
    model = Pair()
    report = approximate(model, seed=0)
    step(model, x)
    resample(model, x)
    assert report["a"].site.skips and report["b"].site.skips
    set_thresholds(monkeypatch, whole=20)  # b is read whole as well
    model = Pair()
    report = approximate(model, seed=0)
    for _ in range(3):
        step(model, x)
    resample(model, x)
    assert report["b"].skipped.startswith("nothing: 16,384 multiplies saved are fewer")
    assert report["a"].skipped == "nothing: no linear layer before it, and read whole by cat"
    assert not converted(model)


def test_a_rate_that_is_not_the_models_is_that_of_stock_dropout_too():
    model, x = nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5), nn.Linear(20, 2)), torch.ones(64, 20)
    approximate(model, seed=0, rate=0.9)
    for _ in range(3):
        step(model, x)
    torch.manual_seed(0)
    found = model[1](x)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(x, 0.9))
    assert converted(model) == ["1"] and model[1].p == 0.5


def test_steps_that_drop_nothing_decide_nothing():
    """The paper's distribution: a third of the steps keep all units, and show nobody who reads."""
    model, x = Attention(), torch.randn(2, 8, 64)
    report = approximate(model, interleave=False, shuffle=False, keep="one", concentration=0.0, min_gain=0, seed=0)
    sampler = report["drop"].site.sampler
    while sampler.dp > 1:  # until the next step is such a one
        state = sampler.state_dict()
        sampler.draw()
    sampler.load_state_dict(state)
    step(model, x)
    assert sampler.dp == 1
    resample(model, x)
    assert isinstance(model.scores, ApproxDropoutSite)
    for _ in range(9):
        step(model, x)
    assert type(model.scores) is nn.Dropout
    assert_skips(report, "drop")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_batches_of_nested_tensors_and_endless_ones_show_no_shapes():
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=layout)
        assert shapes_of((nested, torch.zeros(2))) is None
    batch = [torch.zeros(2)]
    batch.append(batch)
    assert shapes_of(batch) is None


def test_batches_are_compared_by_the_shapes_of_their_tensors():
    x, y = torch.zeros(3, 4), torch.zeros(3)
    assert shapes_of({"x": x, "more": [y, "text"]}) == ((3, 4), (3,)) and shapes_of(["text", 3]) is None
    assert _covers(((3, 4), (3,)), ((2, 4), (2,))) and not _covers(((3, 4), (3,)), ((4, 3), (3,)))
    assert _covers(None, None) and not _covers(None, ((1,),)) and not _covers(((3, 4),), ((3, 4, 1),))


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.head, self.losses = Attention(), nn.Linear(64, 4), []

    def training_step(self, batch, index):
        x, y = batch
        loss = F.cross_entropy(self.head(self.net(x)).mean(1), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("skipping", [True, False])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(skipping, shuffle, tmp_path):
    """Decisions, masks of stock dropout and, between epochs, the order of the data; also within an epoch."""
    options = {"min_gain": 0} if skipping else {}

    def fit(epochs, checkpoint=None, every=None):
        seed_everything(1 if checkpoint is None else 2)
        g = torch.Generator().manual_seed(0)
        n = 20 if shuffle else 4  # if not: all batches are one, since Lightning begins a loader anew within an epoch
        x, y = torch.randn(n, 6, 64, generator=g), torch.randint(4, (n,), generator=g)
        data = TensorDataset(x.repeat(20 // n, 1, 1), y.repeat(20 // n))
        seed_everything(1)
        model, callback = Net(), ApproxDropout(seed=3, **options)
        if checkpoint is not None:
            torch.manual_seed(77)  # of another process
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=every or 5, save_top_k=-1)
        trainer = Trainer(
            max_epochs=epochs, callbacks=[callback, keep], logger=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(model, DataLoader(data, 4, shuffle=shuffle), ckpt_path=checkpoint)
        if skipping:
            assert_skips(callback.report, "net.drop")
        assert type(model.net.scores) is nn.Dropout
        return model

    straight = fit(3)
    at_end = fit(3, tmp_path / "step=5.ckpt")
    assert straight.losses[5:] == at_end.losses
    models = [at_end]
    if not shuffle:
        fit(1, every=2)
        within = fit(3, tmp_path / "step=2.ckpt")
        assert straight.losses[2:] == within.losses
        models.append(within)
    for model in models:
        for p, q in zip(straight.parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_the_state_holds_the_decisions():
    model, x = Attention(), torch.randn(2, 8, 64)
    approximate(model, seed=0, min_gain=0)
    step(model, x)
    resample(model, x)
    state = conversion_of(model).settling.state_dict()
    other = Attention()
    approximate(other, seed=0, min_gain=0)
    conversion_of(other).settling.load_state_dict(state)
    assert converted(other) == converted(model) == ["up", "drop", "down"]
    resample(other, x)
    assert converted(other) == ["up", "drop", "down"]
    resample(other, torch.randn(2, 9, 64))
    assert "scores" in converted(other)
    assert conversion_of(other).settling.state_dict()["uses"] == state["uses"]


class ResidualBlock(nn.Module):
    """A dropout inside the block, which two layers skip by, and one before the residual sum, which only one does."""

    def __init__(self):
        super().__init__()
        self.up, self.inner = nn.Linear(64, 256), nn.Dropout(0.5)
        self.down, self.last = nn.Linear(256, 64), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.last(self.down(self.inner(self.up(x).relu())))


@pytest.mark.parametrize("compiled", [False, True])
def test_residual_sums_have_stock_dropout_but_for_studies(compiled, monkeypatch):
    set_thresholds(monkeypatch, saved=1, saved_compiled=1, whole=0)
    x = torch.randn(24, 64)
    for options, expected in (({}, ["inner"]), ({"min_gain": 1}, ["inner", "last"])):
        model = ResidualBlock()
        report = approximate(model, **options)
        forward = torch.compile(model, backend=rewriting) if compiled else model
        for _ in range(3):
            resample(model, x)
            forward(x).sum().backward()
        assert [site.name for site in report.sites if site.skips] == expected
        assert ("read whole by add, where few masks cost quality" in str(report)) == (not options)


@pytest.mark.parametrize(("pattern", "skips"), [("row", False), ("tile", True)])
def test_narrow_sequences_below_half_are_stock_but_for_tiles(pattern, skips, monkeypatch):
    """Tiles are of weights: what few units of a row pattern cost does not concern them."""
    set_thresholds(monkeypatch, saved=1, saved_tiles=1, sequence=512)
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, 64))
    report = approximate(model, pattern=pattern, seed=0)
    x = torch.randn(8, 4, 256)
    step(model, x)
    step(model, x)
    assert bool(report["0"].site.skips) == skips
    assert ("256 features of sequences are too few" in str(report)) != skips


def test_the_device_limits_the_number_of_orders(monkeypatch):
    """Eager layers and compiled graphs each have their own fewest rows per group."""
    for eager, compiled, expected in ((1, 1, (2, 2)), (9, 1, (1, 2)), (1, 9, (2, 1))):
        set_thresholds(monkeypatch, group_rows=eager, group_rows_compiled=compiled)
        found = []
        for graph in (False, True):
            model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64))
            report = approximate(model, seed=0, orders=2, group_rows=2, concentration=float("inf"))
            forward = torch.compile(model, backend=rewriting) if graph else model
            x = torch.randn(32, 64)
            resample(model, x)
            forward(x).sum().backward()
            (pattern,) = report["1"].site.last_patterns
            found.append(pattern.use.orders if graph else pattern.n_orders)
            assert report["1"].site.skips
        assert tuple(found) == expected
