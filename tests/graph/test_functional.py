"""``F.dropout`` in compiled graphs: it skips like ``nn.Dropout``; its graph runs only while patterns are drawn."""

import gc
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from support import ROOT, TESTS
from support.compiled import converted, equals_masks, masking, results, rewriting, worst
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from approxdrop_lightning import ApproxDropout, approximate, resample, restore
from approxdrop_lightning.conversion import conversion_of, replay_key
from approxdrop_lightning.graph import book as book_module
from approxdrop_lightning.graph.counts import COUNTS
from approxdrop_lightning.graph.rewrite import rewrite
from approxdrop_lightning.surgery import NoEffectWarning

BOTH = "producer's rows and consumers' columns"
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::approxdrop_lightning.surgery.NoEffectWarning"),
]


def aot(gm, inputs):
    """The pass and AOTAutograd, which makes inputs of buffers, without a code generator."""
    rewrite(gm)
    return lookup_backend("aot_eager")(gm, inputs)


class Calls(nn.Module):
    """Two hidden layers, each dropped by a function call."""

    def __init__(self, rates=(0.5, 0.3), always=False):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 40), nn.Linear(40, 20), nn.Linear(20, 4)
        self.rates, self.always = rates, always

    def forward(self, x):
        x = F.dropout(F.relu(self.a(x)), self.rates[0], self.always or self.training)
        x = F.dropout(F.relu(self.b(x)), p=self.rates[1], training=self.always or self.training)
        return self.c(x)


class Mixed(Calls):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.c(F.dropout(F.relu(self.b(self.drop(self.a(x)))), 0.5, self.training))


class FeedForward(nn.Module):
    """The feed-forward part of a transformer's layer, as it is often written."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 40), nn.Linear(40, 12)

    def forward(self, x):
        return x + self.down(F.dropout(F.gelu(self.up(self.norm(x))), 0.3, self.training))


class InPlace(Calls):
    def forward(self, x):
        x = F.dropout(F.relu(self.a(x)), 0.5, self.training, inplace=True)
        x = torch.dropout_(self.b(x), 0.5, self.training)
        return self.c(torch.dropout(x, 0.2, train=self.training))


def helper(x, training):
    return F.dropout(F.relu(x), 0.5, training)


class Helped(Calls):
    def forward(self, x):
        return self.c(helper(self.b(helper(self.a(x), self.training)), self.training))


class Checkpointed(nn.Module):
    """One block three times, in segments of which two are equal; beside it an ``nn.Dropout`` of the same model."""

    def __init__(self):
        super().__init__()
        self.block, self.first = FeedForward(), nn.Sequential(nn.Linear(12, 40), nn.Dropout(0.5), nn.Linear(40, 12))

    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=False)
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "shape", "products"),
    [
        (Calls, (6, 12), (2, 2)),
        (Mixed, (6, 12), (2, 2)),
        (FeedForward, (5, 3, 12), (1, 1)),
        (InPlace, (6, 12), (2, 2)),
        (Helped, (6, 12), (2, 2)),
        (Checkpointed, (6, 12), (4, 4)),
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_outputs_and_gradients_equal_those_of_masks(kind, shape, products, shuffle):
    torch.manual_seed(0)
    difference, report = equals_masks(kind().double(), data(*shape), steps=3, shuffle=shuffle)
    assert difference < 1e-14
    assert not counters["graph_break"]
    assert (COUNTS.producers, COUNTS.consumers) == products
    assert all(row.site.skips for row in report)


@pytest.mark.parametrize("backend", [aot, "inductor"])
@pytest.mark.parametrize("kind", [Calls, Checkpointed])
def test_the_table_is_an_input_of_compiled_code(kind, backend):
    """What is written to it before a step is what the step reads."""
    torch.manual_seed(0)
    model, x = kind().double(), data(6, 12)
    report, conversion = converted(model)
    f, g = torch.compile(model, backend=backend, fullgraph=True), torch.compile(model, backend=masking)
    resample(model)
    f(x)
    steps = []
    for step in range(3):
        resample(model)
        found = results(f, x, model, step)
        conversion.resample(False)
        assert worst(found, results(g, x, model, step)) < 1e-14
        steps.append(found[0])
    assert not torch.equal(steps[0], steps[1]) and not torch.equal(steps[1], steps[2])
    assert {row.skipped for row in report} <= {BOTH, "producer's rows and consumers' columns"}
    restore(model)


def test_the_report_has_a_row_for_each_module_and_line():
    model = nn.Sequential(Calls(), FeedForward())
    model[0].c = nn.Linear(20, 12)
    report, _ = converted(model)
    assert [row.rate for row in report] == [None] * 3  # by the source code
    assert all("skips only in graphs of torch.compile" in row.skipped for row in report)
    compiled = torch.compile(model, backend=rewriting)
    for _ in range(3):
        resample(model)
        compiled(torch.randn(6, 12)).sum().backward()
    line = Calls.forward.__code__.co_firstlineno
    names = [f"0 (test_functional.py:{line + i})" for i in (1, 2)]
    assert [(row.name, row.rate) for row in report][:2] == [(names[0], 0.5), (names[1], 0.3)]
    assert (report[names[0]].producer, report[names[0]].consumers) == ("0.a", ("0.b",))
    assert report[2].name.startswith("1 (test_functional.py:") and report[2].skipped == BOTH
    assert report.saved == pytest.approx(
        1 - (12 * 40 * 0.5 + 40 * 20 * 0.35 + 20 * 12 * 0.7 + 2 * 12 * 40 * 0.7) / (12 * 40 + 40 * 20 + 20 * 12 + 960)
    )
    restore(model)


def test_one_graph_serves_all_steps_and_the_dropped_share_is_the_rate():
    model, x = Calls((0.3, 0.9)), torch.randn(40, 12)
    report, _ = converted(model)
    compiled = torch.compile(model, backend=rewriting, fullgraph=True)
    kept, masks = torch.zeros(40), set()
    for _ in range(200):
        resample(model)
        compiled(x).sum().backward()
        (pattern,) = report[0].site.last_patterns
        mask = pattern.mask(40)
        kept += mask.double().mean(0).float()
        masks.add(tuple(mask[0].tolist()))
        assert pattern.share == pytest.approx(0.7)
    assert counters["stats"]["unique_graphs"] == COUNTS.graphs == 1
    assert len(masks) > 100
    assert (kept / 200 - 0.7).abs().max() < 0.1
    restore(model)


def test_graphs_of_layers_do_not_become_more():
    """At .3 an ``nn.Dropout`` has four pairs; the function call beside it has one."""
    model, x = Calls((0.5, 0.5)), torch.randn(40, 12)
    model.drop = nn.Dropout(0.3)
    model.forward = lambda x: Calls.forward(model, model.drop(x))
    report, conversion = converted(model)
    compiled = torch.compile(model, backend=rewriting)
    for _ in range(60):
        resample(model)
        compiled(x).sum().backward()
    assert 1 < counters["stats"]["unique_graphs"] <= conversion.book.graphs <= 4
    assert [row.skipped for row in report][1:] == [BOTH, BOTH]
    restore(model)


def test_each_use_of_a_line_has_a_pattern_of_its_own():
    model, x = Checkpointed(), torch.randn(6, 12)
    report, _ = converted(model)
    resample(model)
    torch.compile(model, backend=rewriting)(x).sum().backward()
    (site,) = (row.site for row in report if row.name.startswith("block ("))
    assert len({tuple(p.mask(6).flatten().tolist()) for p in site.last_patterns}) == 3
    restore(model)


def test_blocks_compiled_separately_have_patterns_of_their_own():
    """Without a guard on the block, Dynamo would use the graph of the first one for all."""
    model, x = nn.Sequential(*(FeedForward() for _ in range(12))), torch.randn(6, 12)
    report, _ = converted(model)
    blocks = [torch.compile(block, backend=rewriting) for block in model]
    for _ in range(2):
        resample(model)
        y = x
        for block in blocks:
            y = block(y)
        y.sum().backward()
    patterns = [p for site in report.sites for p in site.last_patterns]
    assert len({tuple(p.mask(6).flatten().tolist()) for p in patterns}) == len(report) == 12
    assert counters["stats"]["unique_graphs"] == COUNTS.consumers == 12
    restore(model)


def test_a_call_in_a_function_belongs_to_the_model_it_is_given():
    model, x = Calls().double(), data(6, 12)
    report, conversion = converted(model)

    def step(model, x):
        return model.b(F.dropout(model.a(x).relu(), 0.5, model.training))

    f, g = (torch.compile(step, backend=backend, fullgraph=True) for backend in (rewriting, masking))
    resample(model)
    found = results(lambda x: f(model, x) + 0 * model.c(model.b(model.a(x))).sum(), x, model)
    conversion.resample(False)
    assert worst(found, results(lambda x: g(model, x) + 0 * model.c(model.b(model.a(x))).sum(), x, model)) < 1e-14
    row = report[-1]
    assert row.name.startswith("the model (test_functional.py:") and (row.producer, row.consumers) == ("a", ("b",))
    restore(model)


@pytest.mark.parametrize("always", [False, True])
def test_evaluation_is_stock(always):
    """Also of dropout that is never turned off: its masks must not be those of the last training step."""
    model, x = Calls((0.5, 0.5), always), torch.randn(64, 12)
    report, _ = converted(model)
    compiled = torch.compile(model, backend=rewriting)
    for _ in range(2):
        model.train()
        resample(model)
        compiled(x).sum().backward()
        model.eval()
        torch.manual_seed(0)
        first, second = compiled(x), compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(first, model(x))
        assert torch.equal(first, second) != always
    assert COUNTS.graphs == 1 and report[0].skipped == BOTH
    assert counters["stats"]["unique_graphs"] == 2
    restore(model)


def test_a_restored_model_drops_as_the_stock_one():
    model, x = Calls((0.5, 0.5)), torch.randn(64, 12)
    converted(model)
    compiled = torch.compile(model, backend=rewriting)
    resample(model)
    compiled(x).sum().backward()
    restore(model)
    for _ in range(2):
        torch.manual_seed(0)
        found = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, model(x))
        assert not torch.equal(found, compiled(x))
    assert COUNTS.graphs == 1


def test_a_second_conversion_finds_the_calls_again():
    """Also those that the first one had left to PyTorch; as long as nothing skips, nothing is drawn."""
    model, x = Calls((0.5, 0.5)), torch.randn(64, 12)
    compiled = torch.compile(model, backend=rewriting)
    for min_gain in (None, 0, None, 0):
        report = approximate(model, min_gain=min_gain, seed=0)
        for _ in range(3):
            resample(model, x)
            compiled(x).sum().backward()
        assert [row.rate for row in report] == [0.5, 0.5]
        assert [row.skipped == BOTH for row in report] == [min_gain == 0] * 2
        assert conversion_of(model).settling.is_idle == (min_gain is None)
        restore(model)


def test_graphs_of_the_stock_model_are_not_used():
    """Whether they are compiled before the conversion or after it: the code is the same, and nothing in it is."""
    stock, model, x = Calls((0.5, 0.5)), Calls((0.5, 0.5)), torch.randn(64, 12)
    compiled, other = (torch.compile(m, backend=rewriting) for m in (model, stock))
    compiled(x)
    other(x)
    report, _ = converted(model)
    for _ in range(2):
        resample(model)
        other(x)
        compiled(x).sum().backward()
    assert [row.skipped for row in report] == [BOTH, BOTH]
    assert counters["stats"]["unique_graphs"] == 2
    assert type(model.a) is not nn.Linear and type(stock.a) is type(model.eval().a) is nn.Linear
    restore(model)


def test_models_of_one_class_do_not_share_graphs():
    """Nor the decisions in them."""
    models, x = [Calls((0.5, 0.5)) for _ in range(3)], torch.randn(64, 12)
    reports = [approximate(model, min_gain=gain, seed=0) for model, gain in zip(models, (None, 0, 0), strict=True)]
    compiled = [torch.compile(model, backend=rewriting) for model in models]
    for _ in range(2):
        for model, f in zip(models, compiled, strict=True):
            resample(model, x)
            f(x).sum().backward()
    assert [[row.skipped == BOTH for row in report] for report in reports] == [[False] * 2, [True] * 2, [True] * 2]
    assert all("fewer than" in row.skipped for row in reports[0])
    assert counters["stats"]["unique_graphs"] == 3
    restore(models[1])
    resample(models[2], x)
    compiled[2](x).sum().backward()
    assert counters["stats"]["unique_graphs"] == 3


def test_recomputation_outside_of_graphs_has_the_same_patterns():
    """Of a compiled block in an eager model, checkpointed there."""
    torch.manual_seed(0)
    model, x = nn.Sequential(FeedForward(), FeedForward()).double(), data(6, 12)
    report, conversion = converted(model)
    resample(model)
    found = []
    for backend, again in ((rewriting, True), (rewriting, False), (masking, False)):
        blocks = [torch.compile(block, backend=backend) for block in model]
        conversion.resample(False)

        def forward(x, blocks=blocks, again=again):
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False) if again else block(x)
            return x

        found.append(results(forward, x, model))
    assert worst(found[0], found[1]) < 1e-15 and worst(found[0], found[2]) < 1e-14
    assert [row.skipped for row in report] == [BOTH, BOTH]
    restore(model)


def test_a_model_that_is_gone_leaves_no_patterns_behind():
    model, x = Calls((0.5, 0.5)), torch.randn(64, 12)
    converted(model)
    a, b = model.a, model.b

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    outer = Outer(model)
    compiled = torch.compile(outer, backend=rewriting)
    resample(model)
    compiled(x).sum().backward()
    assert COUNTS.graphs == 1
    restore(model)
    del model
    gc.collect()
    assert not torch.equal(compiled(x), compiled(x))
    assert (a.weight.grad is not None) and (b.weight.grad is not None)


@pytest.mark.parametrize(
    ("rate", "options", "reason"),
    [
        (0.15, {}, "no pattern of max_dp=10 and keep='any' drops exactly 0.15"),
        (0.3, {"keep": "one"}, "no pattern of max_dp=10 and keep='one' drops exactly 0.3"),
        (1.0, {}, "it drops everything"),
        (0.5, {"min_gain": None}, "fewer than"),
    ],
)
def test_calls_that_stay_native_say_why(rate, options, reason):
    model, x = Calls((rate, 0.0)), torch.randn(64, 12)
    report, _ = converted(model, **options)
    compiled = torch.compile(model, backend=rewriting)
    for _ in range(2):
        resample(model, x)
        torch.manual_seed(0)
        found = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, model(x))
        found.sum().backward()
    (row,) = (row for row in report if row.rate == rate)
    assert reason in row.skipped
    assert counters["stats"]["unique_graphs"] == 1 and COUNTS.consumers == 0
    restore(model)


class Scheduled(Calls):
    rate = 0.5

    def forward(self, x):
        return self.b(F.dropout(self.a(x), self.rate, self.training))


def test_a_rate_that_changes_stays_native_and_the_report_says_so():
    """From the second value on, Dynamo makes an input of it."""
    model, x = Scheduled(), torch.randn(200, 12)
    report, _ = converted(model)
    compiled = torch.compile(model, backend=rewriting)
    for rate in (0.5, 0.4, 0.2, 0.8):
        model.rate = rate
        resample(model)
        torch.manual_seed(0)
        found = compiled(x)
        if rate != 0.5:
            torch.manual_seed(0)
            torch.testing.assert_close(found, model(x))
    assert [(row.rate, row.skipped) for row in report] == [
        (0.5, BOTH), (None, "nothing: its rate changes from step to step"),
    ]  # fmt: skip
    restore(model)


class Shared(Calls):
    """Drops in place what something else reads as well."""

    def forward(self, x):
        x = self.a(x)
        y = x.view(-1)
        F.dropout(x, 0.5, self.training, True)
        return self.b(y.view(x.shape))


def test_dropout_in_place_of_a_tensor_that_others_read_stays():
    model, x = Shared(), torch.randn(6, 12)
    report, _ = converted(model)
    resample(model)
    torch.manual_seed(0)
    found = torch.compile(model, backend=rewriting)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(found, model(x))
    assert report[0].skipped == "nothing: it works in place on a tensor that others read"
    restore(model)


def test_other_backends_keep_the_stock_dropout_and_the_report_says_so():
    model, x = Calls((0.5, 0.5)), torch.randn(64, 12)
    report, _ = converted(model)
    resample(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))
    assert all("skips only in graphs of torch.compile (inductor)" in row.skipped for row in report)
    restore(model)


def test_a_table_that_is_too_small_is_replaced(monkeypatch):
    """Graphs with the smaller one do not run again."""
    monkeypatch.setattr(book_module, "_ROOM", 100)
    torch.manual_seed(0)
    model, x = Calls((0.5, 0.5)).double(), data(6, 12)
    report, conversion = converted(model, shuffle=False)
    f, g = (torch.compile(model, backend=backend) for backend in (rewriting, masking))
    for step in range(5):
        resample(model)
        found = results(f, x, model)
        conversion.resample(False)
        # In the first step, the call that does not fit is native dropout.
        assert not step or worst(found, results(g, x, model)) < 1e-14
    (table,) = conversion.book.tables.values()
    assert len(table) > 100
    assert [row.skipped for row in report] == [BOTH, BOTH]
    restore(model)


def test_replayed_steps_depend_on_the_table_only():
    model, x = Calls((0.5, 0.5)), torch.randn(6, 12)
    converted(model)
    compiled, keys = torch.compile(model, backend=rewriting), []
    for _ in range(10):
        resample(model)
        compiled(x).sum().backward()
        keys.append(replay_key(model))
    assert len(set(keys[1:])) == 1
    restore(model)


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = Calls((0.5, 0.5)), []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("loss", F.cross_entropy(self.net(x), y))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(rows=48):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, 12, generator=generator), torch.randint(4, (rows,), generator=generator)
    return DataLoader(TensorDataset(x, y), 8)


def fit(tmp_path, epochs, checkpoint=None, resampling="batch", min_gain=0, model=None):
    seed_everything(1 if checkpoint is None else 2)
    model = model or Lit()
    model.net.compile(backend=rewriting)
    callback = ApproxDropout(resample=resampling, seed=3, min_gain=min_gain)
    trainer = Trainer(
        max_epochs=epochs, callbacks=[callback], accumulate_grad_batches=3, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader(), loader(16), ckpt_path=checkpoint)
    trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt", weights_only=False)
    return model, callback


@pytest.mark.filterwarnings("error::approxdrop_lightning.surgery.NoEffectWarning")
@pytest.mark.parametrize(("resampling", "min_gain"), [("batch", 0), ("step", 0), ("batch", None)])
def test_lightning_and_resume(tmp_path, resampling, min_gain):
    """A model without any layer that is converted; a resumed run is bit for bit the uninterrupted one."""
    keys = list(Lit().state_dict())
    fit(tmp_path, 1, None, resampling, min_gain)
    torch.compiler.reset()
    resumed, _ = fit(tmp_path, 3, tmp_path / "1.ckpt", resampling, min_gain)
    torch.compiler.reset()
    COUNTS.clear()
    counters.clear()
    straight, callback = fit(tmp_path, 3, None, resampling, min_gain)
    assert straight.losses[-12:] == resumed.losses[-12:]
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert list(straight.state_dict()) == keys
    assert (callback.report[0].skipped == BOTH) == (min_gain == 0)
    assert (callback.realised_rate == pytest.approx(0.5)) if min_gain == 0 else callback.realised_rate is None
    assert COUNTS.graphs == 1 and counters["stats"]["unique_graphs"] == 2  # and evaluation


def test_a_second_fit_continues_the_sequence(tmp_path):
    model, callback = fit(tmp_path, 1)
    saved = callback.state_dict()["samplers"]
    assert set(saved) == {"0.0"} and callback.state_dict()["settled"]["in_graphs"]
    steps = len(model.losses)
    trainer = Trainer(
        max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader())
    assert len(model.losses) == steps + 6
    assert callback._steps == steps + 6
    assert callback.report[0].skipped == BOTH


def test_eager_mode_leaves_calls_alone_and_says_so():
    model, x = Calls((0.5, 0.5)), torch.randn(6, 12)
    with pytest.warns(NoEffectWarning, match="no dropout could be converted") as warned:
        report = approximate(model)
    assert "skips only in graphs of torch.compile" in str(warned[0].message)
    resample(model)
    torch.manual_seed(0)
    found = model(x)
    restore(model)
    torch.manual_seed(0)
    assert torch.equal(found, model(x)) and not report.sites


FRESH = """
import sys, warnings
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from approxdrop_lightning import approximate, resample

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 40), nn.Linear(40, 4)

    def forward(self, x):
        return self.b(F.dropout(self.a(x), 0.5, self.training))

warnings.simplefilter("ignore")
torch.manual_seed(0)
model, x = Net().double(), torch.randn(6, 12, dtype=torch.float64)
report = approximate(model, min_gain=0, seed=int(sys.argv[1]))
compiled = torch.compile(model)
for _ in range(3):
    resample(model)
    y = compiled(x)
    y.sum().backward()
    (pattern,) = report.sites[0].last_patterns
    mask = pattern.mask(6, dtype=torch.float64, value=2.0)
    assert torch.allclose(y, F.linear(model.a(x) * mask, model.b.weight, model.b.bias))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"],
      counters["aot_autograd"]["autograd_cache_hit"], report[0].skipped)
"""


def test_the_cache_of_compiled_graphs_serves_a_fresh_process(tmp_path):
    script = tmp_path / "fresh.py"
    script.write_text(FRESH)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    runs = [
        subprocess.run(
            [sys.executable, str(script), seed], cwd=tmp_path, env=environment, capture_output=True, text=True,
            timeout=240, check=False,
        )
        for seed in ("0", "1")
    ]  # fmt: skip
    assert not any(run.returncode for run in runs), [run.stderr[-3000:] for run in runs]
    first, second = (run.stdout.split(" ", 3) for run in runs)
    assert int(first[1]) and first[3].strip() == second[3].strip() == BOTH
    assert int(second[0]) + int(second[2]) and not int(second[1])
