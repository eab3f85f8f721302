"""Features of the Trainer in combination with the callback."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import ROOT, TESTS
from support.lightning_nets import Net, Patterns, data
from torch import nn

from approxdrop_lightning import ApproxDropout

pytestmark = pytest.mark.filterwarnings("ignore")


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):  # the second forward has its own patterns
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


def fit(model, *callbacks, tmp_path, loaders=None, **options):
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | options
    trainer = Trainer(
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(model, loaders)
    return trainer


@pytest.mark.parametrize("resample", ["batch", "step"])
def test_accumulated_batches_have_their_own_patterns_or_share_them(resample, tmp_path):
    callback = ApproxDropout(min_gain=0, resample=resample, seed=0)
    patterns = Patterns(callback)
    fit(Net(), callback, patterns, tmp_path=tmp_path, accumulate_grad_batches=2)
    pairs = list(zip(patterns.seen[::2], patterns.seen[1::2], strict=True))
    assert len(pairs) == 6
    assert all((a == b) == (resample == "step") for a, b in pairs)
    assert len({a for a, _ in pairs}) == 6


def test_manual_optimization_has_a_pattern_for_each_forward(tmp_path):
    callback = ApproxDropout(min_gain=0, seed=0)
    patterns = Patterns(callback)
    fit(Manual(), callback, patterns, tmp_path=tmp_path)
    assert all(len(step) == 2 and step[0] != step[1] for step in patterns.seen)


def test_several_dataloaders(tmp_path):
    callback = ApproxDropout(min_gain=0)
    patterns = Patterns(callback)
    fit(Net(), callback, patterns, tmp_path=tmp_path, loaders=[data(16), data(8)])
    assert all(len(step) == 2 for step in patterns.seen)


@pytest.mark.parametrize(
    "finder",
    [lambda: LearningRateFinder(num_training_steps=10), lambda: BatchSizeFinder("power", max_trials=2, init_val=8)],
)
def test_finders_that_fit_inside_leave_no_trace(finder, tmp_path):
    """The patterns of the real steps are those of a run without the finder."""
    runs = []
    for extra in ([], [finder()]):
        seed_everything(0)
        callback = ApproxDropout(min_gain=0, seed=0)
        patterns = Patterns(callback)
        model = Net()
        fit(model, *extra, callback, patterns, tmp_path=tmp_path)
        runs.append(patterns.seen)
        assert type(model.net[0]) is nn.Linear
    few = min(map(len, runs))  # the number of steps depends on the batch size found
    assert few > 2
    assert [[p.offset for p in step] for step in runs[0][:few]] == [
        [p.offset for p in step] for step in runs[1][:few]
    ]


@pytest.mark.parametrize("averaging", [lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1), WeightAveraging])
def test_weight_averaging_beside_it(averaging, tmp_path):
    callback, model = ApproxDropout(min_gain=0), Net()
    fit(model, callback, averaging(), tmp_path=tmp_path, max_epochs=3, loaders=None)
    assert callback.report["net.2"].producer == "net.0"
    assert [type(m) for m in model.net] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]


def test_untested_strategies_are_refused_by_name(tmp_path):
    class Odd(type(Trainer(accelerator="cpu", logger=False).strategy)):
        pass

    strategy = Odd(device=torch.device("cpu"))
    with pytest.raises(MisconfigurationException, match="Odd is not among the tested strategies"):
        fit(Net(), ApproxDropout(min_gain=0), tmp_path=tmp_path, strategy=strategy, accelerator="auto")
    fit(
        Net(),
        ApproxDropout(min_gain=0, untested_strategies=True),
        tmp_path=tmp_path,
        strategy=strategy,
        accelerator="auto",
    )


DDP = """
import sys, torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from support.lightning_nets import Net, Patterns, data
from approxdrop_lightning import ApproxDropout

class Dump(Patterns):
    def on_train_end(self, trainer, module):
        steps = [[(p.dp, p.keep, p.offset, p.order.tolist()) for p in step] for step in self.seen]
        torch.save({"steps": steps, "weights": module.state_dict()}, f"{sys.argv[2]}/rank{trainer.global_rank}.pt")

if __name__ == "__main__":
    seed_everything(0)
    callback = ApproxDropout(min_gain=0, rate=0.7, block_size=4, sync_patterns=sys.argv[3] == "sync")
    trainer = Trainer(max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      callbacks=[callback, Dump(callback)])
    trainer.fit(Net(), data(8))
"""


@pytest.mark.parametrize("sync", ["sync", "own"])
def test_two_processes_stay_in_step(sync, tmp_path):
    """The same dp on both, patterns equal or not as configured, equal gradients and weights."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    run = subprocess.run(
        [sys.executable, str(script), str(TESTS), str(tmp_path), sync],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(first["steps"]) == 18
    for a, b in zip(first["steps"], second["steps"], strict=True):
        assert [p[:2] for p in a] == [p[:2] for p in b]
    assert (first["steps"] == second["steps"]) == (sync == "sync")
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key])


def test_no_grad_forwards_in_training_mode_have_no_history(tmp_path):
    """Statistics taken in training mode under no_grad are masked like a training forward, without history."""
    model = Net()
    callback = ApproxDropout(min_gain=0, seed=0)

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            with torch.no_grad():
                out = module.net(batch[0])
            assert type(out) is torch.Tensor
            assert not out.requires_grad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, callback, Look(), tmp_path=tmp_path)
