"""Outside of training steps a converted model is the stock one."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from support.gallery import GALLERY, mlp
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

from approxdrop_lightning import ApproxDropout, ApproxLinear, ApproxLSTM, approximate, resample, restore
from approxdrop_lightning.conversion import conversion_of
from approxdrop_lightning.layers.converted import Converted
from approxdrop_lightning.layers.lazy_tensor import LazyTensor
from approxdrop_lightning.policy import THRESHOLDS

ALL = {"min_gain": 0, "pattern_everywhere": True}


@pytest.mark.parametrize("pattern", ["row", "tile"])
@pytest.mark.parametrize("name", list(GALLERY))
def test_in_evaluation_mode_the_classes_are_the_stock_ones_until_the_next_step(name, pattern):
    torch.manual_seed(0)
    make, make_input = GALLERY[name]
    model, x = make().double(), make_input()
    x = x.double() if x.is_floating_point() else x
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0, pattern=pattern, **ALL)
    converted = [type(m) for m in model.modules()]
    for _ in range(2):
        resample(model)
        assert [type(m) for m in model.modules()] == converted
        (model(x) * 1.0).sum().backward()
        assert any(row.site.last_patterns for row in report if row.site)
        model.eval(), stock.eval()
        assert layers(model) == layers(stock)
        assert torch.equal(model(x), stock(x))
        model.train()
        assert not any(isinstance(m, Converted) for m in model.modules())
    defers = [m.__dict__.get("defers") for m in model.modules()]
    assert not any(defers)
    resample(model)
    restore(model)
    assert layers(model) == layers(stock)


def test_a_part_that_evaluates_in_training_has_stock_layers():
    model, stock = (nn.Sequential(mlp(), nn.Dropout(0.5), nn.Linear(10, 2)) for _ in range(2))
    report = approximate(model, seed=0, **ALL)
    for _ in range(2):
        model[0].eval()
        resample(model)
        model(torch.randn(4, 20)).sum().backward()
        assert layers(model[0]) == layers(stock[0])
    assert report["1"].consumers == ("2",) and not report["0.0"].site.last_patterns


def layers(model: nn.Module) -> list[tuple[type, set[str]]]:
    """Class and attributes of each layer."""
    return [(type(m), set(m.__dict__)) for m in model.modules() if not type(m).__module__.startswith("support.")]


class Sampled(LightningModule):
    """Dropout as a sampler in validation: Monte-Carlo dropout."""

    def __init__(self):
        super().__init__()
        self.net, self.seen, self.kept = mlp(), [], []

    def training_step(self, batch, _):
        out = self.net(batch)
        self.kept.append((type(self.net[2]), [type(m) for m in self.net.modules() if isinstance(m, Converted)]))
        self.features = self.net[2](torch.randn(4, 33))
        return out.square().sum()

    def on_train_batch_end(self, *_):
        self.features.sum().item()

    def validation_step(self, batch, _):
        self.net.train()
        self.seen.append((type(self.net[4]), torch.stack([self.net(batch.expand(64, 20)) for _ in range(8)])))
        self.net.eval()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def test_dropout_as_a_sampler_in_validation_is_the_stock_one():
    model, data = Sampled(), torch.randn(4, 1, 20)
    callback = ApproxDropout(interleave=False, **ALL)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        enable_model_summary=False,
        **quiet,
        num_sanity_val_steps=1,
    )
    trainer.fit(model, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None))
    assert all(cls is ApproxLinear and classes for cls, classes in model.kept) and len(model.kept) == 8
    assert [cls for cls, _ in model.seen] == [nn.Dropout] * 3
    for _, samples in model.seen:
        assert (samples.std(1) > 0).all() and (samples.std(0) > 0).all()  # within a batch, and from call to call


def test_after_a_step_in_training_mode_the_layers_are_stock_to_a_callback_of_others():
    model = mlp()
    report = approximate(model, seed=0, **ALL)
    resample(model)
    model(torch.randn(4, 20)).sum().backward()
    before = report["0"].site.last_patterns
    conversion_of(model).stepping = False  # as the callback says at the end of a batch
    torch.manual_seed(0)
    found = model(torch.ones(4, 20))
    torch.manual_seed(0)
    assert torch.equal(found, copy.deepcopy(model)(torch.ones(4, 20)))
    assert report["0"].site.last_patterns == before
    resample(model)
    assert isinstance(model[0](torch.ones(4, 20)), LazyTensor)


def test_forgetting_resample_is_said_once_and_patterns_do_not_pile_up():
    others = {"min_gain": 1 << 60}, {"pattern": "tile"}, {"pattern": "dropconnect"}
    for options in (*(ALL | other for other in others), ALL):  # where dropouts are masks, drop weights, and skip
        model = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.5), nn.Linear(64, 4))
        report = approximate(model, seed=0, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(130):
                model(torch.randn(2, 20)).sum().backward()
        (warning,) = [w for w in caught if "resample" in str(w.message)]
        assert str(warning.message).startswith("1: 100 backward passes without any call of resample(model)")
    site = report["1"].site
    for _ in range(3000):
        model[1](torch.ones(1, 64))
    assert len(site.last_patterns) <= 1024
    first = site.last_patterns[-1]
    resample(model)
    model[1](torch.ones(1, 64))
    assert len(site.last_patterns) == 1 and site.last_patterns[0] != first


@pytest.mark.parametrize("pattern", ["row", "tile", "dropconnect"])
def test_forgetting_resample_is_said_when_the_model_evaluates(pattern):
    """From then on it would be the stock model: no layer of ours would be left to say anything."""
    model = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    approximate(model, seed=0, **ALL, pattern=pattern)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval(), model.train()
    assert not caught  # as Lightning does before the first step
    resample(model)
    restore(model)
    approximate(model, seed=0, **ALL, pattern=pattern)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for _ in range(3):
                model(torch.randn(2, 20)).sum().backward()
            model.eval(), model.train()
    (warning,) = [w for w in caught if "resample" in str(w.message)]
    assert str(warning.message).startswith("1: 3 backward passes without any call of resample(model)")


@pytest.mark.parametrize("pattern", ["row", "tile", "dropconnect"])
def test_backward_passes_of_another_model_are_not_those_of_forgotten_steps(pattern):
    idle, busy = (nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.5), nn.Linear(64, 4)) for _ in range(2))
    report, _ = (approximate(model, seed=0, **ALL, pattern=pattern) for model in (idle, busy))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for times in (1, 2):
            for _ in range(110):
                resample(busy)
                busy(torch.randn(2, 20)).sum().backward()
            idle(torch.randn(2, 20)).sum().backward()
            if times == 1:
                resample(idle)
        idle.eval(), idle.train()
    assert report.sites[0].consumers or pattern == "dropconnect"


def test_accumulated_gradients_are_no_forgotten_resample():
    model = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.5), nn.Linear(64, 4))
    report = approximate(model, seed=0, **ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            resample(model)
            for _ in range(8):
                model(torch.randn(2, 20)).sum().backward()
            model.eval(), model.train()
    assert report.sites[0].consumers


class Plain(nn.Linear):
    """Adds what computes nothing."""

    def __init__(self, *args, note="x"):
        super().__init__(*args)
        self.note = note

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.note}"


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class PlainLSTM(nn.LSTM):
    pass


class OddLSTM(nn.LSTM):
    def forward(self, x, hx=None):
        return super().forward(x, hx)


class PlainDropout(nn.Dropout):
    pass


class OddDropout(nn.Dropout):
    def forward(self, x):
        return super().forward(x)


def test_classes_derived_from_the_stock_ones_are_converted_if_they_compute_the_same():
    model = nn.ModuleDict(
        {
            "up": Plain(20, 32, note="y"), "drop": PlainDropout(0.5), "down": Plain(32, 16),
            "lstm": PlainLSTM(16, 8, 2, dropout=0.5), "odd": Odd(8, 4), "odd lstm": OddLSTM(4, 4, 2, dropout=0.3),
            "odd drop": OddDropout(0.2),
        }
    )  # fmt: skip
    classes = [type(m) for m in model.values()]
    report = approximate(model, seed=0, **ALL)
    resample(model)
    for name, kind in (("up", ApproxLinear), ("lstm", ApproxLSTM)):
        assert isinstance(model[name], kind) and isinstance(model[name], type(copy.deepcopy(model[name])))
    assert model["up"].note == "y" and "y" in repr(model["up"])
    x = torch.randn(3, 5, 20)
    out = model["lstm"](model["down"](model["drop"](model["up"](x))))[0]
    out.sum().backward()
    assert report["drop"].skipped == "producer's rows and consumers' columns"
    assert report["lstm (after layer 0)"].consumers == ("lstm (layer 1)",)
    own = "has code of its own for what it computes"
    assert report["odd lstm (after layer 0)"].skipped == f"nothing: its class OddLSTM {own}"
    assert report["odd drop"].skipped == f"nothing: its class OddDropout {own}"
    assert f"odd is left as it is: its class Odd {own}" in str(report)
    model.eval()
    assert [type(m) for m in model.values()] == classes
    model.train()
    resample(model)
    loaded = copy.deepcopy(model)
    restore(model)
    assert [type(m) for m in model.values()] == [type(m) for m in loaded.values()] == classes
    assert loaded["up"].note == "y"


def test_packed_sequences_have_the_rate_that_was_asked_for_and_the_report_says_who_drops():
    model = nn.ModuleDict({"lstm": nn.LSTM(8, 512, 2, dropout=0.5)})
    report = approximate(model, rate=0.7, seed=0)
    resample(model)
    x = pack_padded_sequence(torch.randn(6, 3, 8), torch.tensor([6, 4, 2]))
    rates = []

    def spy(*args):
        rates.append(args[6])
        return stock(*args)

    stock, torch._VF.lstm = torch._VF.lstm, spy
    try:
        out, _ = model["lstm"](x)
    finally:
        torch._VF.lstm = stock
    out.data.sum().backward()
    assert rates == [0.7] and model["lstm"].dropout == 0.5
    row = report["lstm (after layer 0)"]
    assert row.skipped == "nothing: nn.LSTM runs packed sequences, with conventional dropout of 0.7"
    assert report.multiplies == 12 * 4 * 512 * (8 + 3 * 512)
    resample(model)
    model["lstm"](torch.randn(6, 3, 8))[0].sum().backward()
    assert row.consumers == ("lstm (layer 1)",)
    assert row.skipped == "consumers' columns; nn.LSTM runs packed sequences, with conventional dropout of 0.7"


class FlashAttention(nn.Module):
    """The rate of a dropout is handed to a function."""

    def __init__(self):
        super().__init__()
        self.query, self.drop, self.out = nn.Linear(8, 8), nn.Dropout(0.2), nn.Linear(8, 8)

    def forward(self, x):
        q = self.query(x)
        plain = F.scaled_dot_product_attention(q, q, q, dropout_p=0.0)
        return self.out(plain + F.scaled_dot_product_attention(q, q, q, dropout_p=self.drop.p))


def test_dropout_inside_attention_is_named_with_the_rate_that_it_has():
    model = nn.Sequential(FlashAttention(), nn.Dropout(0.2), nn.Linear(8, 8))
    report = approximate(model, rate=0.7, seed=0, **ALL)
    resample(model)
    model(torch.randn(2, 5, 8)).sum().backward()
    assert (
        "or a function (of attention, for one) is given its rate, the model's own of 0.2" in report["0.drop"].skipped
    )
    (call,) = [row for row in report if "test_between_steps.py" in row.name]
    assert call.skipped == "nothing: dropout inside attention is left as it is"


@pytest.mark.parametrize(("width", "gains"), [(64, False), (1024, True)])
def test_the_headline_is_about_time_and_not_positive_where_the_policy_is_stock(width, gains):
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, width))
    for options in ({}, ALL):
        report = approximate(model, seed=0, **options)
        resample(model)
        model(torch.randn(64, width)).sum().backward()
        total = 2 * 64 * width**2
        assert report.saved == pytest.approx(0.5 if gains or options else 0)
        overhead = 2 * THRESHOLDS["cpu"].saved / total
        assert report.saved_time == pytest.approx(max(0.5 - overhead, 0) if gains else 0)
        assert f"saved in expectation: {report.saved_time:.0%} of the time of the model's products" in str(report)
        restore(model)
