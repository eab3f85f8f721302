"""Entry points: Lightning and custom loops, inductor's hook and the backend; and that settings are put back."""

import gc
import importlib.metadata
import tomllib

import pytest
import torch
import torch._inductor.config as inductor
from lightning.pytorch import LightningModule, Trainer, seed_everything
from support import ROOT
from support.compiled import masking, results, rewriting, worst
from torch import nn
from torch._dynamo.backends import registry
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils.data import DataLoader, TensorDataset

from approxdrop_lightning import ApproxDropout, approximate, resample, restore
from approxdrop_lightning.conversion import conversion_of
from approxdrop_lightning.graph import doors, limit, native, packed
from approxdrop_lightning.graph.counts import COUNTS
from approxdrop_lightning.graph.layout import Rows

ALL = {"min_gain": 0, "concentration": float("inf")}
SILENT = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(6, 8)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
        self.losses = []

    def forward(self, x):
        return self.net(self.before(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data(rows=24):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, 6, generator=generator), torch.randint(2, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), 8)


def whole(model, **options):
    return torch.compile(model, **options)


def method(model, **options):
    model.compile(**options)
    return model


def inner(model, **options):
    model.net = torch.compile(model.net, **options)
    return model


def step(model, **options):
    model.training_step = torch.compile(model.training_step, **options)
    return model


@pytest.mark.parametrize("door", [whole, method, inner, step])
def test_lightning(door):
    seed_everything(1)
    model = Net()
    kinds, keys = [type(m) for m in model.net.modules()], list(model.state_dict())
    callback = ApproxDropout(**ALL)
    Trainer(max_epochs=2, callbacks=[callback], **SILENT).fit(door(model, backend=rewriting), data())
    assert (COUNTS.graphs, COUNTS.producers, COUNTS.consumers) == (1, 1, 1)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    (row,) = callback.report
    assert row.producer.endswith(".0") and row.consumers[0].endswith(".3")
    assert row.skipped == "producer's rows and consumers' columns"
    assert callback.realised_rate == pytest.approx(0.5)
    net = model.net._orig_mod if door is inner else model.net
    assert [type(m) for m in net.modules()] == kinds
    assert [key.replace("_orig_mod.", "") for key in model.state_dict()] == keys
    assert len(set(model.losses)) == len(model.losses) == 6


def test_plain_compile_uses_inductors_hook_which_is_put_back():
    mine = []
    with inductor.patch(pre_grad_custom_pass=mine.append):
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
        approximate(model, seed=0, **ALL)
        f, g = torch.compile(model), torch.compile(model, backend=masking)
        x = torch.randn(5, 8)
        for _ in range(2):
            resample(model)
            found = results(f, x, model)
            conversion_of(model).resample(False)
            assert worst(found, results(g, x, model)) < 1e-5
        assert (COUNTS.producers, COUNTS.consumers) == (1, 1)
        assert mine  # the user's own pass has run as well
        restore(model)
    assert inductor.pre_grad_custom_pass is None


def test_settings_are_put_back():
    before = inductor.pre_grad_custom_pass, torch._dynamo.config.recompile_limit
    models = [nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2)) for _ in range(2)]
    for model in models:
        approximate(model)
    assert isinstance(inductor.pre_grad_custom_pass, doors.Pass)
    assert torch._dynamo.config.recompile_limit > before[1]
    restore(models[0])
    assert isinstance(inductor.pre_grad_custom_pass, doors.Pass)
    del models, model  # never restored
    gc.collect()
    assert (inductor.pre_grad_custom_pass, torch._dynamo.config.recompile_limit) == before


def test_backend_approxdrop(monkeypatch):
    """By its name, as an installed package registers it, with options of inductor."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
        "torch_dynamo_backends"
    ]
    entry = importlib.metadata.EntryPoint("approxdrop", declared["approxdrop"], "torch_dynamo_backends")
    assert entry.load() is doors.approxdrop
    torch._dynamo.list_backends()  # which looks for entry points once
    monkeypatch.setitem(registry._BACKENDS, "approxdrop", entry)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
    approximate(model, seed=0, **ALL)
    resample(model)
    with inductor.patch(pre_grad_custom_pass=None):  # without the hook
        compiled = torch.compile(model, backend="approxdrop", options={"epilogue_fusion": False})
        compiled(torch.randn(5, 8)).sum().backward()
    assert (COUNTS.producers, COUNTS.consumers) == (1, 1)
    restore(model)


@pytest.mark.parametrize("given", [{"mode": "reduce-overhead"}, {"options": {"epilogue_fusion": False}}])
def test_modes_and_options_of_inductor(given):
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
    report = approximate(model, seed=0, **ALL)
    resample(model)
    torch.compile(model, **given)(torch.randn(5, 8)).sum().backward()
    assert report[0].skipped == "producer's rows and consumers' columns"
    restore(model)


def test_launches_are_at_most_twice_those_of_native_dropout():
    """Kernels and library calls in the generated code of forward and backward."""

    def launches(model, x):
        def train():
            return torch.compile(model)(x).sum().backward()

        _, codes = run_and_get_code(train)
        calls = [code.split("def call(", 1)[-1] for code in codes]
        return sum(call.count("extern_kernels.") + call.count("cpp_fused") for call in calls)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2)
    )
    x = torch.randn(6, 8)
    native_dropout = launches(model, x)
    torch.compiler.reset()
    approximate(model, seed=0, **ALL)
    resample(model)
    found = launches(model, x)
    restore(model)
    assert COUNTS.consumers == 2
    assert 0 < found <= 2 * native_dropout


def test_custom_loop_with_the_original_or_the_compiled_model():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
    compiled = torch.compile(model, backend=rewriting)
    approximate(compiled, seed=0, **ALL)
    for m in (compiled, model):
        resample(m)
        compiled(torch.randn(5, 8)).sum().backward()
    assert COUNTS.consumers == 1
    restore(compiled)
    assert type(model[2]) is nn.Dropout
    approximate(model)
    restore(compiled)
    assert type(model[2]) is nn.Dropout


@pytest.mark.parametrize(("resampling", "min_gain"), [("batch", 0), ("step", 0), ("batch", None)])
def test_resume_is_bit_for_bit(tmp_path, resampling, min_gain):
    """``min_gain=None``: all dropouts are native, and PyTorch's random numbers go on."""

    def fit(epochs, checkpoint=None):
        torch.compiler.reset()
        seed_everything(1 if checkpoint is None else 2)  # of a resumed run only the checkpoint counts
        model = Net()
        callback = ApproxDropout(resample=resampling, seed=3, rate=0.3, min_gain=min_gain)
        trainer = Trainer(max_epochs=epochs, callbacks=[callback], accumulate_grad_batches=3, **SILENT)
        trainer.fit(method(model, backend=rewriting), data(48), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt", weights_only=False)
        return model

    fit(1)
    resumed = fit(3, tmp_path / "1.ckpt")
    straight = fit(3)
    assert straight.losses[-12:] == resumed.losses[-12:]
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulation_has_one_pattern_for_a_step():
    model = Net()
    callback = ApproxDropout(resample="step", **ALL)
    places = []

    class Look(ApproxDropout):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            (pattern,) = self.report.sites[0].last_patterns
            places.append(pattern.mask(8).tolist())

    callback = Look(resample="step", **ALL)
    trainer = Trainer(max_epochs=1, callbacks=[callback], accumulate_grad_batches=2, **SILENT)
    trainer.fit(method(model, backend=rewriting), data(32))
    assert places[0] == places[1] != places[2] == places[3]


def test_a_model_in_bfloat16():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2)).bfloat16()
    report = approximate(model, seed=0, **ALL)
    resample(model)
    x, found = torch.randn(6, 8, dtype=torch.bfloat16), []
    for backend in (rewriting, masking):
        conversion_of(model).resample(False)
        found.append(results(torch.compile(model, backend=backend, fullgraph=True), x, model))
        assert all(value.dtype == torch.bfloat16 for value in found[-1])
    assert report[0].skipped == "producer's rows and consumers' columns"
    assert worst(*([value.double() for value in values] for values in found)) < 2e-2
    restore(model)


@pytest.mark.parametrize("where", ["around", "within"])
def test_autocast(where):
    """Products are in 16 bits, as in stock layers, and gradients of parameters in 32."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
    model = Cast(layers) if where == "within" else layers
    approximate(model, seed=0, **ALL)
    resample(model)
    x, outputs = torch.randn(6, 8), []
    for backend in (rewriting, masking):
        conversion_of(model).resample(False)
        with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
            y = torch.compile(model, backend=backend, fullgraph=True)(x)
        assert y.dtype == torch.bfloat16
        model.zero_grad()
        y.float().square().sum().backward()
        outputs.append([y.float().detach(), *(p.grad.clone() for p in model.parameters())])
    assert COUNTS.consumers == 1
    assert worst(*outputs) < 2e-2
    restore(model)


class Cast(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.layers(x)


def test_large_products_are_computed_in_c(monkeypatch):
    if native.library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(native, "LEAST", 0)
    calls = []
    for name in ("product", "input_grad", "weight_grad"):
        op = getattr(torch.ops.approxdrop, name)
        monkeypatch.setattr(torch.ops.approxdrop, name, lambda *a, op=op, name=name: calls.append(name) or op(*a))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 96), nn.Dropout(0.5))
    approximate(model, seed=0, **ALL)
    for shape in ((26, 20), (25, 20), (7, 6, 20), (256, 4, 20)):
        x = torch.randn(shape)
        resample(model)
        found = results(torch.compile(model, backend=rewriting), x, model)
        conversion_of(model).resample(False)
        assert worst(found, results(torch.compile(model, backend=masking), x, model)) < 1e-3
    assert {name: calls.count(name) for name in calls} == {"product": 8, "input_grad": 8, "weight_grad": 8}
    restore(model)


@pytest.mark.parametrize("pair", [(3, 1), (3, 2), (10, 3), (10, 7)])
def test_products_in_c_equal_bmm_for_each_layout(pair, monkeypatch):
    """Also where rounding makes groups overlap that are disjoint in eager mode, such as thirds of 128 blocks."""
    if native.library() is None:
        pytest.skip("no C compiler")
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2048, 1024), nn.Dropout(0.5))
    report = approximate(model, seed=0, min_gain=0)
    book, cpu = conversion_of(model).book, torch.device("cpu")
    inside, outside = (
        book.use(site, 0, n, (96,), pair, cpu).use for site, n in zip(report.sites, (2048, 1024), strict=True)
    )
    rows = Rows(inside.layout.all_groups)
    x = torch.randn(rows.groups, -(-96 // rows.groups), inside.layout.width, requires_grad=True)
    weight, bias = model[1].weight, model[1].bias
    found = []
    for least in (0, 1 << 62):
        monkeypatch.setattr(native, "LEAST", least)
        assert native.serves(weight, x, inside, outside, 1) == (least == 0)
        y = packed.linear(x, weight, bias, book.table(cpu), inside, outside, rows)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    assert worst(*found) < 1e-5
    restore(model)


def test_reaching_the_recompile_limit_warns_once():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 2))
    report = approximate(model, seed=0, min_gain=0)
    compiled, x = torch.compile(model, backend=rewriting), torch.randn(5, 8)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.warns(limit.RecompileLimitWarning) as warned:
        for _ in range(200):
            resample(model)
            compiled(x).sum().backward()
    text = str(warned.pop(limit.RecompileLimitWarning).message)
    assert "recompile_limit=2): 2 and the layers beside it run eagerly" in text
    assert f"needs {len(conversion_of(model).book._pairs[id(report.sites[0].sampler)].support)} graphs" in text
    assert not [w for w in warned if issubclass(w.category, limit.RecompileLimitWarning)]
    assert COUNTS.graphs == 2
    assert "producer's rows and consumers' columns; in part eager: the limit of graphs" in str(report)
    restore(model)


@pytest.mark.parametrize("how", ["eager", "eager_on_recompile", "force_eager"])
def test_no_warning_if_eager_mode_was_asked_for(how, recwarn):
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
    approximate(model, seed=0, **ALL)
    compiled, x = model if how == "eager" else torch.compile(model, backend=rewriting), torch.randn(5, 8)
    compiled(x)
    with torch.compiler.set_stance("default" if how == "eager" else how):
        resample(model)
        compiled(torch.randn(6, 8)).sum().backward()
    assert not [w for w in recwarn if issubclass(w.category, limit.RecompileLimitWarning)]
    restore(model)
