"""Tests that need a GPU: the vendor's kernels, captured graphs, timed tiles, whole training runs."""

import json
import subprocess
import sys

import lightning
import pytest
import torch
from support import ROOT
from support.triton_cases import TOLERANCE
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from approxdrop_lightning import ApproxDropout, CudaGraphStep, RowPattern, TilePattern, functional
from approxdrop_lightning.benchmark import contenders, workloads
from approxdrop_lightning.ops.pack import pack_ops, reference
from approxdrop_lightning.surgery import resample

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("backend", ["auto", "compact", "triton"])
@pytest.mark.parametrize("pattern", contenders.PATTERNS)
@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_a_network_has_the_gradients_of_the_reference(pattern, backend, rate):
    workload = workloads.mlp([100, 256, 192, 10], 96)
    options = {"backend": backend, "min_gain": 0}
    contenders.verify(contenders.contender(workload, pattern, rate, **options), rate, **options)


@pytest.mark.parametrize("backend", ["auto", "compact", "triton"])
@pytest.mark.parametrize("pattern", ["row", "shared", "paper"])
@pytest.mark.parametrize("recurrent", [False, True])
def test_a_language_model_has_the_gradients_of_the_reference(pattern, backend, recurrent):
    workload = workloads.lstm(96, 2, 7, 6, 130)
    options = {
        "backend": backend, "recurrent": recurrent, "min_gain": 0
    }  # fmt: skip
    contenders.verify(contenders.contender(workload, pattern, 0.5, **options), 0.5, **options)


@pytest.mark.parametrize("pattern", ["row", "shared", "tile", "dropconnect"])
@pytest.mark.parametrize("least", [None, 0])
def test_a_step_waits_for_nothing(pattern, least):
    options = {"backend": "triton", "min_gain": least}
    step = contenders.contender(workloads.mlp([784, 512, 512, 10], 128), pattern, 0.5, **options)
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_layer_takes_another_pattern():
    """Forward and backward, from a graph: other numbers in the tables are another pattern."""
    n, groups, width = 256, 4, 64
    weight, x = torch.randn(n, n) / 8, torch.randn(groups, 24, width)

    def draw():
        kept = [torch.randperm(n // 16)[:, None] * 16 + torch.arange(16) for _ in range(2)]
        kept = [k.view(groups, width).to(torch.int32) for k in kept]
        return [*kept, *(reference.slots(k, n, 1) for k in kept)]

    tables, direction = draw(), torch.randn(groups, 24, width)

    def layer():
        leaf = weight.requires_grad_()
        y = torch.bmm(x, pack_ops.pack(leaf, *tables, 16).transpose(1, 2))
        return y, *torch.autograd.grad(y, [leaf], direction)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles and chooses
            layer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dw = layer()
    for _ in range(3):
        for table, other in zip(tables, draw(), strict=True):
            table.copy_(other)
        x.normal_()
        graph.replay()
        kept = reference.pack(weight.detach(), tables[0], tables[1])
        torch.testing.assert_close(y, torch.bmm(x, kept.mT), **TOLERANCE[torch.float32])
        wanted = reference.unpack(torch.bmm(direction.mT, x), tables[2], tables[3], n, n)
        torch.testing.assert_close(dw, wanted, **TOLERANCE[torch.float32])


def test_the_sequence_can_be_captured():
    from approxdrop_lightning.ops.lstm import lstm_ops

    gates, state, weight = torch.randn(5, 4, 128), torch.randn(4, 32), torch.randn(128, 32) / 6
    arguments = (gates, state, state, weight, None)
    wanted = lstm_ops.sequence(*arguments)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lstm_ops.sequence(*arguments)[0]
    y.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(y, wanted)


def test_tiles_are_chosen_by_timing(monkeypatch):
    from approxdrop_lightning.ops.tile_linear import triton_tiles

    monkeypatch.setenv("APPROXDROP_AUTOTUNE", "1")
    monkeypatch.setattr(triton_tiles.product, "cache", {})
    pattern = TilePattern(512, 512, 2, 1)
    x, weight = torch.randn(256, 512).half(), torch.randn(512, 512).half()
    y = functional.tile_linear(x, weight, None, pattern, backend="triton")
    wanted = functional.tile_linear(x.double(), weight.double(), None, pattern, backend="reference")
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=0.1)
    assert len(triton_tiles.product.cache) == 1


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("pattern", ["row", "shared", "tile"])
def test_small_networks_are_masked_and_have_the_gradients_of_the_reference(pattern, recurrent):
    options = {"recurrent": True} if recurrent and pattern != "tile" else {}
    workload = workloads.lstm(96, 2, 7, 6, 130)
    step = contenders.contender(workload, pattern, 0.5, **options)
    contenders.verify(step, 0.5, **options)
    step()
    assert pattern == "tile" or not any(site.skips for site in step.report.sites)
    workload = workloads.mlp([100, 256, 192, 10], 96)
    contenders.verify(contenders.contender(workload, pattern, 0.5), 0.5)


def test_cudnn_is_not_given_weights_in_pieces(recwarn):
    step = contenders.contender(workloads.lstm(128, 2, 5, 4, 100), "shared", 0.5, min_gain=0)
    for _ in range(3):
        step()
    assert not [w for w in recwarn if "contiguous chunk" in str(w.message)]


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(256, 4),
        )  # fmt: skip
        self.losses = []

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("pattern", ["row", "tile"])
def test_training(precision, pattern, tmp_path):
    torch.set_default_device(None)  # as a user's
    lightning.seed_everything(1)
    x = torch.randn(2048, 64)
    data = DataLoader(TensorDataset(x, (x @ torch.randn(64, 4)).argmax(1)), batch_size=128, shuffle=True)
    model = Classifier()
    callback = ApproxDropout(pattern=pattern, min_gain=0)
    lightning.Trainer(
        max_epochs=6, precision=precision, accelerator="gpu", devices=1, callbacks=[callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
    ).fit(model, data)  # fmt: skip
    assert model.losses[0] > 1
    assert sum(model.losses[-16:]) / 16 < 0.75


class Quiet(Classifier):
    """Without what no graph can hold; its dropout is off, so that runs can be compared."""

    def __init__(self, rate):
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_whole_steps_are_replayed(optimizer, precision, rate, tmp_path):
    torch.set_default_device(None)
    x = torch.randn(1000, 64)  # a smaller last batch
    data = DataLoader(TensorDataset(x, (x @ torch.randn(64, 4)).argmax(1)), batch_size=128)
    runs = []
    for callbacks in ([], [CudaGraphStep()]):
        lightning.seed_everything(1)
        model = Quiet(rate)
        model.configure_optimizers = lambda m=model: optimizer(m.parameters(), lr=0.01)
        trainer = lightning.Trainer(
            max_epochs=6, precision=precision, accelerator="gpu", devices=1, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path, gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(model, data)
        runs.append((model.losses, trainer.callback_metrics["loss_epoch"].item(), trainer.global_step))
    assert callbacks[0].report == "2 graphs; 42 steps replayed, 6 to warm up, 0 eager"
    if rate == 0:
        torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-2, atol=1e-3)
    assert runs[1][0][-1] < runs[1][0][0]
    assert runs[1][1] == pytest.approx(sum(runs[1][0][-8:]) / 8, rel=0.05)
    assert runs[0][2] == runs[1][2] == 48
    assert len(set(runs[1][0])) == 48  # masks and batches differ in each replay


def test_a_default_device_does_not_reach_patterns():
    """Patterns are the host's, whatever is the default."""
    assert torch.get_default_device().type == "cuda"
    assert RowPattern(64, 2, 0, interleave=True).mask(4).device.type == "cpu"
    step = contenders.contender(workloads.mlp([64, 128, 10], 32), "row", 0.5, min_gain=0)
    resample(step.model)
    step()


@pytest.mark.parametrize("model", ["mlp", "lstm"])
def test_the_main_job_trains_and_tests_its_best_checkpoint(model, tmp_path):
    quick = ["debug=fast", "datamodule.source=synthetic", "trainer.accelerator=gpu", "logger=csv"]
    result = subprocess.run(
        [sys.executable, "train.py", f"model={model}", *quick, f"hydra.run.dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "result.json").read_text())["test"] is not None
