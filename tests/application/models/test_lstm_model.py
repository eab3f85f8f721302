"""LSTMLanguageModel: loss convention, schedule, perplexity over all tokens, carried state."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics import Metric

from approxdrop_lightning.application.models import LSTMLanguageModel

V, T, B = 11, 5, 3


class Text(LightningDataModule):
    """Batches of random words; the loader has a state, so that a run can resume within an epoch."""

    def __init__(self, batches=6, vocab_size=V, padded=False):
        super().__init__()
        self.vocab_size = vocab_size
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(V, (batches * T + 1, B), generator=generator)
        self.batches = [(text[i : i + T], text[i + 1 : i + T + 1].clone()) for i in range(0, batches * T, T)]
        if padded:
            self.batches[-1][1][2:, 1:] = -100

    def train_dataloader(self):
        return Loader(self.batches)

    def val_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    test_dataloader = val_dataloader


class Loader:
    def __init__(self, batches):
        self.batches, self.position = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for index in range(self.position % len(self), len(self)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def make_model(**arguments):
    seed_everything(0, verbose=False)
    return LSTMLanguageModel(**({"vocab_size": V, "hidden_size": 8, "rate": 0.0} | arguments))


def make_trainer(tmp_path, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path}
    return Trainer(**(quiet | defaults | {"enable_checkpointing": False} | arguments))


def test_shapes_and_stock_layers():
    model = make_model(num_layers=3, rate=0.4)
    logits, (h, c) = model(torch.zeros(T, B, dtype=torch.long))
    assert logits.shape == (T, B, V)
    assert h.shape == c.shape == (3, B, 8)
    layers = [part for part in model.children() if not isinstance(part, Metric)]
    assert [type(part).__module__.split(".")[0] for part in layers] == ["torch"] * 5
    assert (model.embedding_dropout.p, model.lstm.dropout, model.decoder_dropout.p) == (0.4, 0.4, 0.4)


def test_initial_values_fill_the_range():
    values = torch.cat([p.detach().flatten() for p in make_model(init_range=0.05).parameters()])
    assert values.abs().max() <= 0.05
    assert values.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.05)


def test_tied_weights_are_one_parameter():
    tied = make_model(tie_weights=True)
    assert tied.decoder.weight is tied.embedding.weight
    sizes = [sum(p.numel() for p in model.parameters()) for model in (make_model(), tied)]
    assert sizes[0] - sizes[1] == V * 8


def test_loss_is_the_sum_over_steps_of_the_mean_over_the_batch():
    batch = Text().batches[0]
    summed, mean = (make_model(loss=loss) for loss in ("sum_steps", "mean"))
    summed.log = mean.log = lambda *_, **__: None
    nll = F.cross_entropy(mean(batch[0])[0].flatten(0, 1), batch[1].flatten())
    torch.testing.assert_close(mean.training_step(batch, 0), nll)
    torch.testing.assert_close(summed.training_step(batch, 0), nll * T)


def test_schedule_is_the_published_one():
    """Zaremba's medium model: 6 epochs at full rate, then divided by 1.2 each."""
    model = make_model(full_lr_epochs=6, lr_decay=1.2)
    factors = [model._lr_factor(epoch) for epoch in range(8)]
    assert factors == pytest.approx([1.0] * 6 + [1 / 1.2, 1 / 1.44])


def test_schedule_reaches_the_optimizer(tmp_path):
    model = make_model(lr=2.0, full_lr_epochs=1, lr_decay=4.0)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(model, Text())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(2.0 / 16)  # of the third epoch


def test_perplexity_is_over_all_tokens_from_the_carried_state(tmp_path):
    """If the state is carried, one pass over the whole text, without padding, gives the same."""
    data, model = Text(padded=True), make_model()
    (metrics,) = make_trainer(tmp_path).test(model, data, verbose=False)
    inputs, targets = (torch.cat(part) for part in zip(*data.batches, strict=True))
    with torch.no_grad():
        nll = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert metrics["test/ppl"] == pytest.approx(nll.exp().item(), rel=1e-5)
    assert metrics["test/loss"] == pytest.approx(nll.item(), rel=1e-5)


def test_validation_within_an_epoch_does_not_disturb_training(tmp_path):
    with_validation, without = make_model(), make_model()
    make_trainer(tmp_path, max_epochs=2, val_check_interval=2).fit(with_validation, Text())
    make_trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(without, Text())
    torch.testing.assert_close(with_validation.state_dict(), without.state_dict(), rtol=0, atol=0)


def test_state_is_carried_and_starts_anew_with_the_epoch_and_with_another_batch_size():
    model, (inputs, targets) = make_model(), Text().batches[0]
    model.log = lambda *_, **__: None
    model.on_train_batch_start(None, 0)
    first = model.training_step((inputs, targets), 0)
    assert model.training_step((inputs, targets), 1) != first
    assert not model._carried["train"][0].requires_grad
    model.on_train_batch_start(None, 0)
    assert model.training_step((inputs, targets), 0) == first
    narrow = model.training_step((inputs[:, :2], targets[:, :2]), 1)
    assert torch.isfinite(narrow)
    assert model._carried["train"][0].shape == (2, 2, 8)


def test_resume_within_an_epoch_is_exact(tmp_path):
    straight = make_model()
    saver = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=4)
    whole = make_trainer(tmp_path, callbacks=[saver], enable_checkpointing=True)
    whole.fit(straight, Text())
    resumed = make_model()
    trainer = make_trainer(tmp_path)
    trainer.fit(resumed, Text(), ckpt_path=tmp_path / "middle.ckpt")
    assert trainer.global_step == 6
    assert trainer.callback_metrics["train/ppl"] == whole.callback_metrics["train/ppl"]
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_without_a_carried_state_loads():
    model = make_model()
    model.on_load_checkpoint({})
    assert model._state("train", B) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, r"dropout rate 1.0 is outside \[0, 1\)"),
        ({"rate": [0.1, 0.2]}, r"dropout rate \[0.1, 0.2\] .* one rate"),
        ({"loss": "total"}, "'sum_steps' or 'mean', got 'total'"),
        ({"hidden_size": 0}, "hidden_size must be .* got 0"),
        ({"vocab_size": None}, "vocab_size must be .* got None"),
        ({"lr_decay": 0}, "lr_decay must be positive, got 0"),
    ],
)
def test_refuses_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


def test_refuses_data_of_another_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=11, but the data has 12 words"):
        make_trainer(tmp_path).fit(make_model(), Text(vocab_size=12))


def test_a_score_is_loaded_to_where_it_is(monkeypatch):
    """On a GPU the model may report its new device before its score has been moved."""
    model = make_model()
    monkeypatch.setattr(LSTMLanguageModel, "device", torch.device("meta"))
    model.on_load_checkpoint({"train_nll": (torch.tensor(6.0), torch.tensor(4.0))})
    assert model.train_nll.compute() == 1.5
