"""Conversion: right by construction, nothing locked in, nothing silently different."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support.gallery import GALLERY, LanguageModel, mlp, twin
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from approxdrop_lightning import ApproxLinear, ApproxLSTM, approximate, resample, restore
from approxdrop_lightning.benchmark import contenders
from approxdrop_lightning.layers.compact_tensor import CompactTensor
from approxdrop_lightning.layers.linear import PendingLinear
from approxdrop_lightning.surgery import NoEffectWarning

SETTINGS = {
    "default": {},
    "paper": {"interleave": False, "shuffle": False, "keep": "one", "concentration": 0.0},
    "shared shuffled": {"interleave": False},
    "interleaved regular, .7": {"shuffle": False, "rate": 0.7},
    "several kept of dp": {"rate": 0.3, "block_size": 1},
    "scale dp": {"scale": "dp", "rate": 0.7},
    "reference": {"backend": "reference"},
    "masked": {"min_features": 1000},
    "masked before an LSTM": {"min_hidden": 1000},
    "recurrent": {"recurrent": True},
    "tile": {"pattern": "tile", "tile_size": 2},
    "tile, .7": {"pattern": "tile", "tile_size": 1, "rate": 0.7},
    "tile, one kept of dp, any dp": {"pattern": "tile", "keep": "one", "concentration": 0.0},
    "tile, scale dp": {"pattern": "tile", "scale": "dp", "rate": 0.7},
    "tile, reference": {"pattern": "tile", "backend": "reference"},
    "tile, masked": {"pattern": "tile", "min_features": 1000},
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
    report = approximate(
        model, seed=1, **{"min_features": 0, "min_multiplies": 0, "min_hidden": 0, **SETTINGS[setting]}
    )
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
    approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
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


def test_restore_gives_the_ordinary_classes_back():
    model = nn.Sequential(mlp(), nn.Dropout2d(0.5))
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    parameters = [id(p) for p in model.parameters()]
    approximate(model)
    assert any(isinstance(m, ApproxLinear) for m in model.modules())
    restore(model)
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert [id(p) for p in model.parameters()] == parameters
    approximate(model)  # and once more


def test_the_report_says_what_is_skipped_and_why_not():
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 128), nn.Dropout(0.0), nn.Linear(128, 32),
        nn.Dropout(0.4), nn.LayerNorm(32), nn.Dropout(1.0), nn.AlphaDropout(0.3),
    )  # fmt: skip
    report = approximate(model, min_features=64, min_multiplies=16 * 64 * 128 // 2)
    assert report["2"].skipped == "not known before the first training batch"
    resample(model)
    model(torch.randn(16, 64)).sum().backward()
    row = report["2"]
    assert (row.producer, row.consumers, row.skipped) == (
        "0",
        ("3",),
        "producer's rows and consumers' columns",
    )
    assert "rate is 0" in report["4"].skipped
    assert "32 features are too few" in report["6"].skipped
    assert "drops everything" in report["8"].skipped
    assert "AlphaDropout" in report["9"].skipped
    assert all(name in str(report) for name in ("2", "producer's rows", "AlphaDropout"))


def test_a_product_too_small_to_gain_is_masked_and_dense():
    """A site may be reached by batches of several sizes; values are those of the mask either way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 8))
    stock = copy.deepcopy(model)
    report = approximate(model, min_multiplies=16 * 64 * 96 // 2, seed=0)
    for rows, small in ((15, True), (16, False), (15, True)):
        resample(model)
        x = torch.randn(rows, 64)
        with Flops() as counter:
            y = model(x).clone()  # read: it waits otherwise
        (pattern,) = model[2].last_patterns
        mask = pattern.mask(rows) * 2.0
        torch.testing.assert_close(y, stock[3](stock[1](stock[0](x)) * mask))
        assert counter.total == (1 if small else 0.5) * 2 * rows * (64 * 96 + 96 * 8)
        if rows == 15 and not report["2"].producer:
            assert (
                report["2"].skipped == "nothing: 46,080 multiplies saved are too few to gain (min_multiplies=49,152)"
            )
    assert report["2"].skipped == "producer's rows and consumers' columns"


@pytest.mark.parametrize(
    ("widths", "executed"), [((8, 64, 256), (1, 0.5)), ((256, 64, 8), (0.5, 0.5)), ((8, 64, 8), (1, 1))]
)
def test_each_layer_beside_a_dropout_skips_where_that_saves_enough(widths, executed):
    n_in, n, n_out = widths
    model = nn.Sequential(nn.Linear(n_in, n), nn.ReLU(), nn.Dropout(0.5), nn.Linear(n, n_out))
    stock = copy.deepcopy(model)
    approximate(model, min_multiplies=16 * 64 * 64, seed=0)
    for _ in range(3):  # from the second step on small layers do not wait
        resample(model)
        x = torch.randn(16, n_in)
        with Flops() as counter:
            y = model(x).clone()
        assert counter.total == 2 * 16 * n * (n_in * executed[0] + n_out * executed[1])
        mask = model[2].last_patterns[0].mask(16) * 2.0
        torch.testing.assert_close(y, stock[3](stock[1](stock[0](x)) * mask))
    waits = executed[0] < 1
    assert isinstance(model[0](x), PendingLinear) == waits


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net, self.lstm, self.reentrant = mlp(), nn.LSTM(10, 12, 2, dropout=0.5), reentrant

    def forward(self, x):
        return self._run(lambda x: self.lstm(x)[0], self._run(self.net, x))

    def _run(self, part, x):
        return part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("options", [{}, {"interleave": False}, {"rate": 0.3}])
def test_activation_checkpointing_computes_again_with_the_same_patterns(options):
    found = []
    for reentrant in (None, True, False):
        torch.manual_seed(0)
        model = Checkpointed(reentrant).double()
        approximate(model, min_features=0, min_multiplies=0, min_hidden=0, seed=0, **options)
        x = torch.randn(5, 4, 20, dtype=torch.float64, requires_grad=True)
        for _ in range(3):
            resample(model)
            model.zero_grad()
            out = model(x) * 1.0
            out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in model.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_activation_checkpointing_of_a_dropout_used_twice_is_refused():
    model = nn.Sequential(*[layer := nn.Dropout(0.5)] * 2, nn.Linear(8, 8))
    approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
    resample(model)
    out = checkpoint(model, torch.randn(4, 8, requires_grad=True), use_reentrant=False)
    with pytest.raises(RuntimeError, match="recomputes a dropout that was used 2 times"):
        out.sum().backward()
    assert layer is model[0]


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x):
        x = F.dropout(self.drop(self.up(x)), 0.2, self.training)
        return self.down(nn.functional.dropout1d(x, 0.1))


def test_functional_dropout_and_dropout_inside_other_layers_are_named():
    model = nn.Sequential(Functional(), nn.MultiheadAttention(8, 2, dropout=0.1), nn.GRU(8, 8, 2, dropout=0.2))
    report = approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
    lines = {row.name: row.skipped for row in report}
    calls = [name for name in lines if "test_surgery.py:" in name]
    assert len(calls) == 2
    assert all(name.startswith("0 (") and "a function" in lines[name] for name in calls)
    assert "MultiheadAttention is left as it is" in lines["1 (attention weights)"]
    assert "GRU is left as it is" in lines["2 (between its layers)"]
    resample(model)
    model[0](torch.randn(2, 5, 8)).sum().backward()  # dropout of a dropped-out tensor: dense, and it runs


def test_a_frozen_part_is_reported():
    """As LightningModule.freeze leaves it: in evaluation mode, without gradients."""
    model = mlp()
    report = approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
    model[1].eval().requires_grad_(False)
    resample(model)
    model(torch.randn(4, 20)).sum().backward()
    assert report["1.3"].skipped == "nothing: not called in training mode so far (frozen or not used)"
    assert report["0"].consumers == ()  # layer 1.0 evaluates, so it reads everything
    assert "producer's rows and consumers' columns" in report["4"].skipped


def test_a_rate_that_is_not_the_models_is_shown_beside_it():
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.0), nn.Linear(64, 2))
    assert "0.7 (own: 0.5)" in str(report := approximate(model, rate=0.7))
    assert (report["3"].rate, report["3"].own_rate) == (0.7, 0.0)
    restore(model)
    assert "own:" not in str(approximate(model, rate=None))


def test_rate_0_turns_the_models_dropout_off():
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.LSTM(64, 64, 2, dropout=0.5))
    stock = copy.deepcopy(model).eval()
    with pytest.warns(NoEffectWarning):
        report = approximate(model, rate=0.0)
    resample(model)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(model(x)[0], stock(x)[0])
    assert [row.skipped for row in report] == ["nothing: the rate is 0"] * 2


class Mixed(nn.Module):
    """Layers of every counted kind, on each way of being called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True, kdim=32, vdim=16)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 64))

    def forward(self, x):  # [5, 4, 4, 4]
        x = self.up(self.conv(x)).flatten(1).unflatten(1, (4, 64))
        y, _ = self.attention(x, value=x[..., :16], key=x[..., 32:])
        return self.mlp(self.norm(y))


def test_the_saved_share_is_one_of_the_whole_model():
    model = Mixed()
    with Flops() as dense:
        model(torch.randn(5, 4, 4, 4))
    report = approximate(model, seed=0)
    for _ in range(2):
        resample(model)
        with Flops() as executed:
            model(torch.randn(5, 4, 4, 4)).sum()
        assert report.multiplies == dense.total / 2
        assert report.saved == pytest.approx(1 - executed.total / dense.total)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_cannot_be_converted_count_too():
    model = nn.ModuleList([nn.GRU(8, 16, 2, bidirectional=True), nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5))])
    report = approximate(model)
    resample(model)
    y, _ = model[0](torch.randn(3, 5, 8))
    model[1](y).sum().backward()
    gates = 3 * 16 * 2 * 15  # of both directions, for 15 rows
    assert report.elsewhere == gates * (8 + 16) + gates * (32 + 16)


def test_conversion_after_the_optimizer_was_built():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.clone() for p in model.parameters()]
    approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
    resample(model)
    model(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_site_whose_width_changes_between_batches_draws_another_pattern():
    model = nn.Dropout(0.5)
    approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
    for width in (16, 24, 16):
        resample(model)
        x = torch.ones(6, width, requires_grad=True)
        torch.testing.assert_close(model(x) * 1.0, model.last_patterns[0].mask(6) * 2.0)
        assert len(model.last_patterns) == 1


def test_the_restored_model_can_be_exported():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    approximate(model)
    restore(model)
    x = torch.randn(3, 8)
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("name", ["mlp", "residual", "lstm"])
def test_under_torch_compile_the_number_of_graphs_is_bounded_and_values_are_right(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    make, make_input = GALLERY[name]
    model, x = make(), make_input()
    approximate(model, min_features=0, min_multiplies=0, min_hidden=0, rate=0.7, seed=0)
    eager = copy.deepcopy(model)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for _ in range(24):  # some twenty different patterns, two periods
        resample(model), resample(eager)
        model.zero_grad(), eager.zero_grad()
        out, expected = compiled(x), eager(x)
        torch.testing.assert_close(out * 1.0, expected * 1.0)
        out.sum().backward(), expected.sum().backward()
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        graphs.append(counter.frame_count)
    assert graphs[-1] <= 8
    assert graphs[-1] == graphs[6]  # none for a pattern that comes later


class Flops(TorchDispatchMode):
    """FlopCounterMode's formulas without its module hooks, which look into every output and so make it dense."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("rate", [0.5, 0.7])
def test_the_report_counts_what_is_saved_in_expectation(rate):
    """Two dropouts of one rate share their period: the mean of the square, counted here over many steps."""
    model = nn.Sequential(
        nn.Linear(60, 240), nn.ReLU(), nn.Dropout(rate), nn.Linear(240, 120), nn.Dropout(rate), nn.Linear(120, 60)
    )
    report = approximate(model, min_multiplies=0, seed=0)
    dense = 60 * 240 + 240 * 120 + 120 * 60
    executed = []
    for _ in range(300):
        resample(model)
        with Flops() as counter:
            model(torch.randn(12, 60))
        executed.append(counter.total / (2 * 12 * dense))
    spread = torch.tensor(executed).std().item() / 300**0.5
    assert report.saved > 0.5
    assert report.saved == pytest.approx(1 - sum(executed) / 300, abs=max(4 * spread, 1e-9))
    assert report.saved_by(report["2"]) == pytest.approx(rate * (60 * 240 + 240 * 120) / dense)
    assert report.saved_by(report["4"]) == pytest.approx(rate * (240 * 120 + 120 * 60) / dense)


def test_a_linear_layer_that_feeds_no_site_stops_waiting():
    model = mlp()
    approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
    for _ in range(2):
        resample(model)
        model(torch.randn(4, 20)).sum().backward()
    defers = {m.name: m.defers for m in model.modules() if isinstance(m, ApproxLinear)}
    assert defers == {"1.0": True, "2": True, "5": False}


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
    report = approximate(model, min_multiplies=0, seed=0)
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
    report = approximate(
        model, interleave=False, shuffle=False, keep="one", concentration=0.0, min_multiplies=0, seed=0
    )
    sampler = report["1"].site.sampler
    while sampler.dp > 1:  # until the next step is such a one
        state = sampler.state_dict()
        sampler.draw()
    sampler.load_state_dict(state)
    for _ in range(9):
        resample(model)
        model(torch.randn(4, 20)).sum().backward()
    assert report.saved == pytest.approx(0.5)


def test_unsupported_lstms_are_left_alone_by_name():
    model = nn.ModuleDict(
        {
            "both": nn.LSTM(4, 4, 2, dropout=0.5, bidirectional=True),
            "projected": nn.LSTM(4, 4, 2, dropout=0.5, proj_size=2),
            "plain": nn.LSTM(4, 4, 2, dropout=0.5),
        }
    )
    report = approximate(model)
    assert "bidirectional" in report["both (after layer 0)"].skipped
    assert "proj_size" in report["projected (after layer 0)"].skipped
    assert [type(m) for m in model.values()] == [nn.LSTM, nn.LSTM, ApproxLSTM]


def test_recurrent_dropout_has_rows_of_its_own():
    model = nn.ModuleList([nn.LSTM(8, 64, 2, dropout=0.5), nn.LSTM(8, 64)])
    report = approximate(model, recurrent=True, seed=0)
    resample(model)
    for lstm in model:
        lstm(torch.randn(3, 5, 8))[0].sum().backward()
    assert report["0 (recurrent, layer 1)"].skipped == "consumers' columns"
    assert report["0 (recurrent, layer 1)"].consumers == ("0",)
    assert report["1 (recurrent, layer 0)"].skipped == "nothing: the rate is 0"
    inputs, hidden = 15 * 4 * 64 * 8, 15 * 4 * 64 * 64
    # of the first LSTM: both recurrent products, and the input of its second layer
    assert report.saved == pytest.approx(0.5 * 3 * hidden / (2 * inputs + 4 * hidden))


def test_weight_norm_is_left_alone():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Dropout(0.5), nn.Linear(8, 8))
    kind = type(model[0])
    approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
    assert type(model[0]) is kind
    assert type(model[2]) is ApproxLinear
    resample(model)
    model(torch.randn(4, 8)).sum().backward()
    assert model[0].parametrizations.weight.original1.grad.any()


def test_nothing_to_convert_warns():
    with pytest.warns(NoEffectWarning, match="no dropout could be converted"):
        assert len(approximate(nn.Linear(3, 3))) == 0


def test_a_converted_model_can_be_copied_pickled_and_saved():
    model = LanguageModel()
    approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
    x = torch.randint(30, (4, 3))
    resample(model)
    model(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for m in (model, *copies):
        resample(m)
    expected = model(x)
    for other in copies:
        assert torch.equal(other(x), expected)  # the sampler's state came along


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
    report = approximate(model, min_features=0)
    resample(model)
    found = model(x)
    expected = twin(stock, report)(x)
    torch.testing.assert_close(found * 1.0, expected, rtol=0, atol=1e-9)
    expected.square().sum().backward(), found.square().sum().backward()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-9)


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


def test_functional_call_reads_the_parameters_that_it_was_given():
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    approximate(model, min_features=0, min_multiplies=0, min_hidden=0)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    resample(model)
    assert not torch.func.functional_call(model, zeros, (torch.randn(2, 4),)).any()


def test_the_global_generator_is_not_used():
    model = LanguageModel()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    approximate(model)
    resample(model)
    model(torch.randint(30, (4, 3), generator=torch.Generator())).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_misuse_is_named():
    model = mlp()
    with pytest.raises(ValueError, match="not converted"):
        resample(model)
    with pytest.raises(ValueError, match="not converted"):
        restore(model)
    approximate(model)
    with pytest.raises(ValueError, match="converted already"):
        approximate(model)
    other = mlp()
    for options, message in (
        ({"pattern": "diagonal"}, "pattern must be one of 'row', 'tile', 'dropconnect', got 'diagonal'"),
        ({"pattern": "tile", "recurrent": True}, "recurrent=True needs pattern='row', got 'tile'"),
        ({"rate": 1.5}, r"\[0, 1\), got 1.5"),
        ({"scale": "none"}, "scale must be 'rate' or 'dp'"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"block_size": 0}, "block_size must be an integer >= 1"),
        ({"interleave": "yes"}, "interleave must be True or False"),
        ({"rate": 0.95}, "smallest max_dp that serves is 20"),
        ({"recurrent": 1}, "recurrent must be True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            approximate(other, **options)
    assert all("Approx" not in type(m).__name__ for m in other.modules())  # nothing was touched


def test_an_infeasible_rate_of_the_model_leaves_it_untouched():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Dropout(0.95))
    with pytest.raises(ValueError, match="smallest max_dp that serves is 20"):
        approximate(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Dropout, nn.Dropout]


def test_rows_of_sequences_take_several_orders_and_those_of_images_one():
    model = nn.Sequential(nn.Linear(20, 64), nn.Dropout(0.7), nn.Linear(64, 8))
    approximate(model, min_multiplies=0, seed=0)
    for shape, expected in (((35, 20, 20), 3), ((700, 20), 1), ((3, 4, 20), 1)):
        resample(model)
        model(torch.randn(shape)).sum().backward()
        (pattern,) = model[1].last_patterns
        assert pattern.n_orders >= expected if expected > 1 else pattern.n_orders == 1


@pytest.mark.parametrize(("rate", "hidden", "masked"), [(0.3, 256, True), (0.3, 320, False), (0.7, 256, False)])
def test_narrow_layers_that_keep_most_by_several_orders_are_masked(rate, hidden, masked):
    model = nn.ModuleList([nn.Dropout(rate), nn.LSTM(hidden, 8)])
    report = approximate(model, seed=0, min_hidden=0, concentration=float("inf"))  # always (10, 7) or (10, 3)
    resample(model)
    x = torch.ones(35, 20, hidden)
    dropped = model[0](x)
    model[1](dropped)[0].sum().backward()
    assert model[0].last_patterns[0].n_orders > 1
    assert isinstance(dropped, CompactTensor) != masked
    assert ("too few to gain at a rate below .5" in str(report)) == masked
    assert (dropped == 0).float().mean() == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("pattern", ["row", "shared"])
def test_an_lstm_too_small_for_a_gpu_is_the_vendor_s_with_masks(pattern, recurrent, monkeypatch):
    """Input masked, and recurrent weights: the same loss and gradients as by the recurrence that skips."""
    found = []
    for masked in (False, True):
        if masked:
            monkeypatch.setattr(ApproxLSTM, "_too_small", lambda *_: True)
        torch.manual_seed(0)
        workload = contenders.lstm(24, 2, 5, 6, 30)
        options = {"recurrent": recurrent, "min_features": 0, "min_multiplies": 0, "min_hidden": 0}
        step = contenders.contender(workload, pattern, 0.5, **options)
        found.append([step.loss_and_gradients(), *(p.grad for p in step.model.parameters())])
        readers = {name for site in step.report.sites for name in site.consumers}
        assert any("lstm" in name for name in readers) is not masked
    for skipped, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, skipped, rtol=1e-4, atol=1e-6)
