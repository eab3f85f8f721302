"""The callback that captures whole steps, with a fake capture: equal training, and what is rejected."""

import lightning
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from support.fake_capture import FakeCapture
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from approxdrop_lightning import ApproxDropout, CudaGraphStep
from approxdrop_lightning.cuda_graph_step import make_capturable


class Net(lightning.LightningModule):
    """A classifier with conventional dropout that logs its loss."""

    def __init__(self, optimizer=None, schedule=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3))
        self.make, self.schedule, self.losses, self.python_calls = optimizer or torch.optim.Adam, schedule, [], 0

    def training_step(self, batch, batch_idx):
        self.python_calls += 1
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "extra": loss * 2}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.extra = outputs["extra"].item()

    def configure_optimizers(self):
        optimizer = self.make(self.parameters(), lr=0.05)
        if not self.schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Captured(CudaGraphStep):
    """As on CUDA."""

    def _capture_for(self, pl_module, optimizer):
        self.capture = FakeCapture(pl_module, optimizer)
        return self.capture


def train(model, *callbacks, rows=44, tmp_path=None, **options):
    """Three epochs of five batches of eight, and one of four."""
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    trainer = lightning.Trainer(
        **{
            "max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": 0.5,
            "callbacks": list(callbacks), "default_root_dir": tmp_path,
        } | options
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=True))
    return trainer


def new(**options):
    torch.manual_seed(0)
    return Net(**options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_same_training(precision, tmp_path):
    """Losses, weights, logs and counts; conventional dropout has the masks it would have had."""
    plain, model, callback = new(), new(), Captured(warmup=2)
    wanted = train(plain, tmp_path=tmp_path, precision=precision)
    found = train(model, callback, tmp_path=tmp_path, precision=precision)
    assert model.losses == plain.losses
    assert len(model.losses) == 18
    assert model.extra == 2 * model.losses[-1]
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert found.global_step == wanted.global_step == 18
    assert found.callback_metrics.keys() == wanted.callback_metrics.keys()
    for name, value in wanted.callback_metrics.items():
        torch.testing.assert_close(found.callback_metrics[name], value)
    # Full batches are captured at the third; the last one of an epoch has come for the third time then.
    assert callback.capture.recorded == 2
    assert callback.report == "2 graphs; 14 steps replayed, 4 to warm up, 0 eager"


def test_a_last_batch_that_comes_too_seldom_is_eager(tmp_path):
    callback = Captured()
    train(new(), callback, tmp_path=tmp_path)
    assert callback.report == "1 graphs; 12 steps replayed, 6 to warm up, 0 eager"


def test_the_module_is_given_back(tmp_path):
    model = new()
    train(model, Captured(), tmp_path=tmp_path)
    assert not {"training_step", "backward", "optimizer_step", "log"} & vars(model).keys()

    class Stops(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                raise KeyError("stopped")

    marker = model.training_step
    vars(model)["training_step"] = marker  # somebody else's, as torch.compile leaves one
    with pytest.raises(KeyError):
        train(model, Captured(), Stops(), tmp_path=tmp_path)
    assert vars(model)["training_step"] is marker
    assert not {"backward", "optimizer_step", "log"} & vars(model).keys()


def test_eager_layers_of_approx_dropout_are_not_repeated(tmp_path):
    """Their patterns are Python's: a replay would have the first one for ever. So the steps are eager, and right."""
    options = {"min_gain": 0, "seed": 3}
    plain, model, callback = new(), new(), Captured(warmup=1)
    train(plain, ApproxDropout(**options), tmp_path=tmp_path)
    dropout = ApproxDropout(**options)
    train(model, dropout, callback, tmp_path=tmp_path)
    assert model.losses == plain.losses
    assert dropout.report.sites[0].skips
    assert callback.report.startswith("0 graphs; 0 steps replayed")
    assert "the patterns of net.2 are drawn by eager layers" in callback.report


class Numbers(Net):
    def training_step(self, batch, batch_idx):
        self.log("number", float(batch_idx), on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_numbers_that_replays_would_repeat(tmp_path):
    callback, model = Captured(warmup=1), Numbers()
    trainer = train(model, callback, tmp_path=tmp_path, max_epochs=1)
    assert trainer.callback_metrics["number_epoch" if "number_epoch" in trainer.callback_metrics else "number"] > 0
    assert "self.log('number') is given float, not a tensor" in callback.report
    assert len(model.losses) == 6


@pytest.mark.parametrize("schedule", [False, True])
def test_each_learning_rate_is_captured_anew_where_it_is_a_number(schedule, tmp_path):
    plain, model, callback = new(schedule=schedule), new(schedule=schedule), Captured(warmup=1)
    train(plain, tmp_path=tmp_path)
    train(model, callback, tmp_path=tmp_path)
    assert model.losses == plain.losses
    replayed = 0 if schedule else 16
    assert (
        callback.report
        == f"{0 if schedule else 2} graphs; {replayed} steps replayed, {18 - replayed} to warm up, 0 eager"
    )


class Hook(Net):
    def on_after_backward(self):
        """Nothing."""


class Manual(Net):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().step()


class Two(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(2)]

    def training_step(self, batch, batch_idx):
        return None


class Watches(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """Nothing."""


@pytest.mark.parametrize(
    ("make", "callbacks", "options", "reason"),
    [
        (Hook, [], {}, "Hook.on_after_backward would not run in replays"),
        (Net, [Watches()], {}, "Watches.on_before_optimizer_step would not run in replays"),
        (Net, [], {"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2, not 1"),
        (Net, [], {"detect_anomaly": True}, "detect_anomaly reads values on the host"),
        (lambda: Net(torch.optim.LBFGS), [], {"gradient_clip_val": None}, "LBFGS evaluates the loss several times"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_who_is_refused_trains_as_always(make, callbacks, options, reason, tmp_path):
    callback = Captured()
    trainer = train(make(), callback, *callbacks, tmp_path=tmp_path, max_epochs=1, **options)
    assert trainer.global_step > 0
    assert callback.report.startswith(f"all steps ran eagerly: {reason}")


def test_manual_optimization_is_refused(tmp_path):
    callback = Captured()
    lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback],
                      enable_progress_bar=False, enable_model_summary=False, limit_train_batches=0,
                      default_root_dir=tmp_path)  # fmt: skip
    model = Manual()
    model.on_train_batch_end = lambda *a: None
    train(model, callback, tmp_path=tmp_path, max_epochs=1, gradient_clip_val=None)
    assert callback.report == "all steps ran eagerly: the module optimizes manually"


def test_on_a_cpu_it_says_so_and_trains(tmp_path):
    plain, model, callback = new(), new(), CudaGraphStep()
    train(plain, tmp_path=tmp_path)
    assert callback.report is None
    with pytest.warns(match="the model is on cpu, and only CUDA has graphs"):
        train(model, callback, tmp_path=tmp_path)
    assert model.losses == plain.losses


@pytest.mark.parametrize("arguments", [{"warmup": 0}, {"max_graphs": True}, {"warmup": 1.5}])
def test_mistakes_are_named(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(MisconfigurationException, match=f"{name} must be an integer >= 1, got {value!r}"):
        CudaGraphStep(**arguments)


def test_optimizers_become_capturable_and_checkpoints_stay_ordinary():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    adam = torch.optim.Adam([parameter], lr=0.1)
    adam.step()
    callback = CudaGraphStep()
    callback._groups = make_capturable(adam, torch.device("cpu"))
    group = adam.param_groups[0]
    assert group["capturable"]
    assert isinstance(group["lr"], torch.Tensor)
    group["lr"].fill_(0.05)
    checkpoint = {"optimizer_states": [adam.state_dict()]}
    callback.on_save_checkpoint(None, None, checkpoint)
    saved = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert saved["capturable"] is False
    assert saved["lr"] == pytest.approx(0.05)
    assert isinstance(group["lr"], torch.Tensor)  # that of the optimizer itself
    other = torch.optim.Adam([nn.Parameter(torch.ones(3))], lr=1.0)
    other.load_state_dict(checkpoint["optimizer_states"][0])
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()  # on a CPU, which refuses capturable=True
    plain = torch.optim.SGD([parameter], lr=0.1)
    assert make_capturable(plain, torch.device("cpu")) == [{"lr": 0.1}]
    assert plain.param_groups[0]["lr"] == 0.1
