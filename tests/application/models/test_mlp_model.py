"""MLPClassifier: a plain module of stock layers."""

import math
from functools import partial

import pytest
import torch
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from approxdrop_lightning.application.models import MLPClassifier


def test_is_made_of_stock_layers_in_order():
    model = MLPClassifier(in_features=12, hidden=(8, 6), num_classes=3, rate=[0.2, 0.5])
    kinds = [type(layer) for layer in model.net]
    block = [nn.Linear, nn.ReLU, nn.Dropout]
    assert kinds == [nn.Flatten, *block, *block, nn.Linear]
    assert [layer.p for layer in model.net if isinstance(layer, nn.Dropout)] == [0.2, 0.5]
    assert model(torch.randn(5, 1, 3, 4)).shape == (5, 3)


def test_one_rate_serves_all_layers_and_no_hidden_layer_is_allowed():
    layers = MLPClassifier(hidden=(8, 8, 8), rate=0.3).net
    assert [layer.p for layer in layers if isinstance(layer, nn.Dropout)] == [0.3] * 3
    assert [type(layer) for layer in MLPClassifier(hidden=()).net] == [nn.Flatten, nn.Linear]


@pytest.mark.parametrize("rate", [1.0, -0.1, 1.5, [0.5, 1.0]])
def test_refuses_a_rate_outside_the_interval(rate):
    wrong = rate[-1] if isinstance(rate, list) else rate
    with pytest.raises(ValueError, match=rf"{wrong} is outside \[0, 1\)"):
        MLPClassifier(hidden=(8, 8), rate=rate)


@pytest.mark.parametrize("rate", ["abc", "0.5"])
def test_a_text_is_no_list_of_rates(rate):
    with pytest.raises(ValueError, match=rf"^rate={rate} is neither a number in \[0, 1\) nor a list of them"):
        MLPClassifier(hidden=(8, 8, 8), rate=rate)


@pytest.mark.parametrize("value", ["a", None, True])
def test_what_is_no_number_among_the_rates_is_named(value):
    with pytest.raises(ValueError, match=rf"dropout rate {value} is outside \[0, 1\)"):
        MLPClassifier(hidden=(8, 8), rate=[0.5, value])


def test_refuses_a_number_of_rates_that_does_not_fit():
    with pytest.raises(ValueError, match=r"3 dropout rates .* for 2 hidden layers"):
        MLPClassifier(hidden=(8, 8), rate=[0.1, 0.2, 0.3])


def test_optimizer_is_the_callers_choice():
    assert isinstance(MLPClassifier().configure_optimizers(), torch.optim.SGD)
    adam = MLPClassifier(optimizer=partial(torch.optim.Adam, lr=0.5)).configure_optimizers()
    assert isinstance(adam, torch.optim.Adam)
    assert adam.param_groups[0]["lr"] == 0.5


def test_accuracy_is_over_samples_not_over_batches():
    """Ten samples in batches of 4, 4 and 2: a mean of batch means would give the last two double weight."""
    model = MLPClassifier(in_features=2, hidden=(), num_classes=2)
    with torch.no_grad():  # logits are the inputs, so the larger input is the prediction
        model.net[1].weight.copy_(torch.eye(2))
        model.net[1].bias.zero_()
    images = torch.tensor([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 2)
    loader = DataLoader(TensorDataset(images, torch.zeros(10, dtype=torch.long)), batch_size=4)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.test(model, loader, verbose=False)
    assert metrics["test/acc"] == pytest.approx(0.8)


def test_checkpoint_loads_without_pickled_functions(tmp_path):
    model = MLPClassifier(in_features=4, hidden=[3], num_classes=2, optimizer=partial(torch.optim.Adam))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    again = MLPClassifier.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu")
    torch.testing.assert_close(again.state_dict(), model.state_dict())


def test_cosine_schedule_falls_to_zero_by_the_step():
    rates = []

    class Watched(MLPClassifier):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.optimizers().param_groups[0]["lr"])

    model = Watched(in_features=4, hidden=(8,), schedule="cosine", optimizer=partial(torch.optim.SGD, lr=0.4))
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.randint(10, (8,))), batch_size=2)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=2, enable_model_summary=False, **options).fit(model, data)
    assert rates == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    with pytest.raises(ValueError, match="schedule must be 'constant' or 'cosine', got 'linear'"):
        MLPClassifier(schedule="linear")
