"""ThroughputLogger: what is counted and what is not."""

import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from approxdrop_lightning import monitor
from approxdrop_lightning.monitor import ThroughputLogger


class Clock:
    """A clock that advances only on request."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Steps(LightningModule):
    """Each training step takes 2 seconds, each validation step 100."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.clock.now += 2.0
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.clock.now += 100.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SlowDraw(Callback):
    """Spends half a second before each step, as drawing patterns might."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.clock.now += 0.5


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(monitor, "perf_counter", clock)
    return clock


def fit(tmp_path, clock, throughput, batches, *others):
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        val_check_interval=2,
        log_every_n_steps=1,
        callbacks=[throughput, *others],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(Steps(clock), loader, loader)
    return trainer


def test_counts_training_steps_after_the_warm_up_only(tmp_path, clock):
    throughput = ThroughputLogger(warmup_steps=4, window_size=2)
    batches = [(torch.zeros(8 if i < 4 else 6, 2), torch.zeros(8)) for i in range(10)]
    trainer = fit(tmp_path, clock, throughput, batches)
    assert throughput.summary == {"samples_per_sec": 3.0, "steps": 6, "seconds": 12.0}
    assert trainer.callback_metrics["throughput/samples_per_sec"] == 3.0
    assert "throughput/tokens_per_sec" not in trainer.callback_metrics


def test_counts_tokens_of_time_major_text(tmp_path, clock):
    throughput = ThroughputLogger(unit="tokens", batch_dim=1, warmup_steps=0, window_size=2)
    trainer = fit(tmp_path, clock, throughput, [(torch.zeros(35, 20), torch.zeros(35, 20))] * 4)
    assert throughput.summary["samples_per_sec"] == 10.0
    assert throughput.summary["tokens_per_sec"] == 350.0
    assert trainer.callback_metrics["throughput/tokens_per_sec"] == 350.0


def test_what_later_callbacks_do_at_the_start_counts(tmp_path, clock):
    throughput = ThroughputLogger(warmup_steps=0)
    fit(tmp_path, clock, throughput, [torch.zeros(5, 1)] * 4, SlowDraw())
    assert throughput.summary["seconds"] == 4 * 2.5


def test_a_step_that_compiles_does_not_count(tmp_path, clock):
    class Compiling(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                clock.now += 1000.0
                torch.compile(lambda x: x + 1, backend="eager")(batch)

    throughput = ThroughputLogger(warmup_steps=1, window_size=2)
    trainer = fit(tmp_path, clock, throughput, [torch.zeros(6, 1)] * 6, Compiling())
    assert throughput.summary == {"samples_per_sec": 3.0, "steps": 4, "seconds": 8.0}
    assert trainer.callback_metrics["throughput/samples_per_sec"] == 3.0


def test_a_fit_within_the_warm_up_has_no_summary(tmp_path, clock):
    throughput = ThroughputLogger(warmup_steps=10)
    fit(tmp_path, clock, throughput, [torch.zeros(5, 1)] * 4)
    assert throughput.summary == {}


def test_each_fit_starts_anew(tmp_path, clock):
    throughput = ThroughputLogger(warmup_steps=2)
    for _ in range(2):
        fit(tmp_path, clock, throughput, [torch.zeros(5, 1)] * 4)
        assert throughput.summary["steps"] == 2


@dataclass
class Pair:
    inputs: torch.Tensor
    targets: torch.Tensor


Named = namedtuple("Named", ["weight", "inputs"])
SEVEN = torch.zeros(7, 3)
BATCHES = {
    "a dataclass": Pair(SEVEN, torch.zeros(7)),
    "dataclasses in a dictionary": {"pair": Pair(SEVEN, torch.zeros(7))},
    "a named tuple with a number first": Named(0.5, SEVEN),
    "NumPy arrays": (np.zeros((7, 3)), np.zeros(7)),
    "a NumPy scalar first": [np.float32(1), np.zeros((7, 3))],
    "a scalar tensor first": {"weight": torch.tensor(1.0), "x": SEVEN},
    "numbers and None first": (3, None, 0.5, SEVEN),
    "texts beside it": (["one"] * 7, SEVEN),
    "texts only": ["one"] * 7,
    "texts in a dictionary": {"id": 3, "text": ("one",) * 7},
    "a mapping": UserDict(ids=SEVEN),
    "packed": nn.utils.rnn.PackedSequence(SEVEN, torch.ones(1, dtype=torch.int64)),
    "no rows": None,
}


@pytest.mark.parametrize("unit", ["samples", "tokens"])
@pytest.mark.parametrize("what", BATCHES)
def test_batches_of_all_kinds_are_counted(what, unit, clock, monkeypatch):
    """Calls the callback's hooks directly, without Lightning's loop."""
    monkeypatch.setattr(monitor, "_wait_for", lambda device: None)
    batch, throughput = BATCHES[what], ThroughputLogger(unit=unit, warmup_steps=0, window_size=2)
    if what == "no rows":  # along with one that has seven
        steps, expected = [(torch.zeros(0, 3), torch.zeros(0)), (SEVEN, torch.zeros(7))] * 2, 3.5
    else:
        steps, expected = [batch] * 4, 7
    trainer, module, logged = SimpleNamespace(global_step=0, log_every_n_steps=1), SimpleNamespace(), []
    trainer.strategy = SimpleNamespace(root_device=None)
    module.log = lambda name, value, **_: logged.append((name, value))
    throughput.on_train_start(trainer, module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, step in enumerate(steps):
            throughput.on_train_batch_start(trainer, module, step, i)
            clock.now += 1.0
            throughput.on_train_batch_end(trainer, module, None, step, i)
    assert throughput.summary["samples_per_sec"] == expected
    assert next(value for name, value in logged if name == "throughput/samples_per_sec") == 7
    assert ("tokens_per_sec" in throughput.summary) == (unit == "tokens")


@pytest.mark.parametrize("batch", [None, (), {}, 3, "text", torch.tensor(1.0), [None, 0.5], object()])
def test_steps_that_cannot_be_counted_are_left_out_with_one_warning(batch, tmp_path, clock):
    throughput = ThroughputLogger(warmup_steps=0, window_size=2)
    with pytest.warns(UserWarning, match="nothing in a batch of the type .* has a dimension batch_dim=0") as seen:
        fit(tmp_path, clock, throughput, [batch, torch.zeros(4, 1), batch, torch.zeros(4, 1)])
    assert sum("ThroughputLogger" in str(warning.message) for warning in seen) == 1
    assert throughput.summary == {"samples_per_sec": 2.0, "steps": 2, "seconds": 4.0}


def endless():
    batch = [None]
    batch.append({"itself": batch})
    return batch


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_left_out_with_one_warning(layout, tmp_path, clock):
    batch = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=layout)
    throughput = ThroughputLogger(warmup_steps=0, window_size=2)
    with pytest.warns(UserWarning, match="nothing in a batch of the type") as seen:
        fit(tmp_path, clock, throughput, [batch, torch.zeros(4, 1), batch, torch.zeros(4, 1)])
    assert sum("ThroughputLogger" in str(warning.message) for warning in seen) == 1
    assert throughput.summary == {"samples_per_sec": 2.0, "steps": 2, "seconds": 4.0}


def test_containers_that_contain_themselves_are_entered_once():
    assert monitor._count(endless(), 0) is None
    batch = endless()
    batch.append(torch.zeros(3, 2))
    assert monitor._count([batch, batch], 0) == (3, 6)


def test_a_batch_of_too_few_dimensions_is_named_with_the_dimension(tmp_path, clock):
    throughput = ThroughputLogger(batch_dim=1, warmup_steps=0)
    with pytest.warns(UserWarning, match="type Tensor has a dimension batch_dim=1"):
        fit(tmp_path, clock, throughput, [torch.zeros(5)] * 2)
    assert throughput.summary == {}


@pytest.mark.parametrize("arguments", [{"unit": "words"}, {"warmup_steps": -1}, {"window_size": 1}])
def test_refuses_bad_values(arguments):
    with pytest.raises(MisconfigurationException, match=str(next(iter(arguments.values())))):
        ThroughputLogger(**arguments)
