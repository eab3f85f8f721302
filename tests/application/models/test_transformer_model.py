"""TransformerLanguageModel: stock layers, causality, schedule, perplexity over all tokens, what is skipped."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from support.runs_of_train import QUICK, SMALL, config, last_weights
from torch.utils.data import DataLoader
from torchmetrics import Metric

from approxdrop_lightning import approximate
from approxdrop_lightning.application.models import TransformerLanguageModel
from datamodules.loader import ResumableLoader
from train import train

V, T, B, H = 11, 6, 3, 16


class Text(LightningDataModule):
    """Batches of a text in which each word determines the next; the last batch is shorter and padded."""

    def __init__(self, batches=6, vocab_size=V):
        super().__init__()
        self.vocab_size = vocab_size
        text = (torch.arange(batches * T + 1).unsqueeze(1) * 3 + torch.arange(B)) % V
        self.batches = [(text[i : i + T], text[i + 1 : i + T + 1].clone()) for i in range(0, batches * T, T)]
        inputs, targets = self.batches[-1]
        targets[2:, 1:] = -100
        self.batches[-1] = inputs[:4], targets[:4]

    def train_dataloader(self):
        return ResumableLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    test_dataloader = val_dataloader


def make_model(**arguments):
    seed_everything(0, verbose=False)
    small = {"vocab_size": V, "hidden_size": H, "num_layers": 2, "num_heads": 2, "context": T, "rate": 0.0}
    return TransformerLanguageModel(**(small | {"warmup_steps": 3} | arguments))


def make_trainer(tmp_path, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path}
    return Trainer(**(quiet | defaults | {"enable_checkpointing": False} | arguments))


def test_shapes_stock_layers_and_rates():
    model = make_model(rate=0.4, attention_rate=0.2, num_layers=3)
    assert model(torch.zeros(T, B, dtype=torch.long)).shape == (T, B, V)
    assert model(torch.zeros(2, B, dtype=torch.long)).shape == (2, B, V)
    parts = [part for part in model.modules() if part is not model and not isinstance(part, Metric)]
    assert {type(part).__module__.split(".")[0] for part in parts} == {"torch"}
    dropouts = [part.p for part in parts if isinstance(part, torch.nn.Dropout)]
    assert dropouts == [0.4] * (2 + 3 * 3)
    assert [layer.self_attn.dropout for layer in model.layers] == [0.2] * 3
    assert model.layers[0].linear1.out_features == 4 * H
    assert make_model(feedforward_size=24).layers[0].linear1.out_features == 24


def test_no_word_sees_those_after_it():
    model = make_model().eval()
    words = torch.randint(V, (T, B), generator=torch.Generator().manual_seed(1))
    other = words.clone()
    other[4:] = (other[4:] + 1) % V
    before, after = model(words), model(other)
    torch.testing.assert_close(before[:4], after[:4], rtol=0, atol=0)
    assert not torch.allclose(before[4:], after[4:])


def test_initial_values():
    """Normal with deviation .02, less before residual sums; norms are one, biases zero."""
    model = make_model(hidden_size=64, num_layers=8, tie_weights=False)
    layer = model.layers[0]
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.self_attn.in_proj_weight.std().item() == pytest.approx(0.02, rel=0.1)
    for weight in (layer.linear2.weight, layer.self_attn.out_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert (layer.norm1.weight == 1).all()


def test_tied_weights_are_one_parameter():
    tied, untied = make_model(), make_model(tie_weights=False)
    assert tied.decoder.weight is tied.embedding.weight
    assert untied.decoder.weight is not untied.embedding.weight


def test_schedule_rises_and_falls_to_the_end_of_the_training(tmp_path):
    rates = []

    class Seen(TransformerLanguageModel):
        def on_before_optimizer_step(self, optimizer):
            rates.append([group["lr"] for group in optimizer.param_groups])

    seed_everything(0, verbose=False)
    model = Seen(V, H, 1, 2, context=T, lr=0.5, warmup_steps=3)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(model, Text())
    expected = [1 / 3, 2 / 3, 1, *((1 + math.cos(math.pi * i / 9)) / 2 for i in range(9))]
    assert [a for a, _ in rates] == pytest.approx([0.5 * factor for factor in expected])
    decays = [(group["weight_decay"], len(group["params"])) for group in trainer.optimizers[0].param_groups]
    assert decays == [(0.01, 1 + 4), (0.0, 1 + 2 + 4 + 4 + 1)]  # matrices; positions, biases and norms


def test_perplexity_is_over_all_tokens(tmp_path):
    """Compared with a computation by hand, batch by batch, without padding."""
    data, model = Text(), make_model()
    (metrics,) = make_trainer(tmp_path).test(model, data, verbose=False)
    nll = tokens = 0.0
    for inputs, targets in data.batches:
        with torch.no_grad():
            nll += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += int((targets != -100).sum())
    assert metrics["test/ppl"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_it_learns_a_text_in_which_each_word_decides_the_next(tmp_path):
    model = make_model(rate=0.1, lr=0.01)
    trainer = make_trainer(tmp_path, max_epochs=30)
    trainer.fit(model, Text())
    assert trainer.callback_metrics["val/ppl"] < 1.1


def test_resume_within_an_epoch_is_exact(tmp_path):
    straight = make_model()
    saver = ModelCheckpoint(tmp_path, filename="middle", every_n_train_steps=4)
    whole = make_trainer(tmp_path, callbacks=[saver], enable_checkpointing=True)
    whole.fit(straight, Text())
    resumed = make_model()
    trainer = make_trainer(tmp_path)
    trainer.fit(resumed, Text(), ckpt_path=tmp_path / "middle.ckpt", weights_only=True)
    assert trainer.global_step == 6
    assert trainer.callback_metrics["train/ppl"] == whole.callback_metrics["train/ppl"]
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, r"dropout rate 1.0 is outside \[0, 1\)"),
        ({"rate": [0.1, 0.2]}, r"dropout rate \[0.1, 0.2\] .* one rate"),
        ({"attention_rate": -0.1}, r"attention_rate -0.1 is outside \[0, 1\)"),
        ({"num_heads": 3}, "hidden_size must be a multiple of num_heads=3, got 16"),
        ({"num_layers": 0}, "num_layers must be .* got 0"),
        ({"feedforward_size": 0}, "feedforward_size must be .* got 0"),
        ({"context": 2.5}, "context must be .* got 2.5"),
        ({"vocab_size": None}, "vocab_size must be .* got None"),
        ({"warmup_steps": -1}, "warmup_steps must be .* got -1"),
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
    ],
)
def test_refuses_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


def test_refuses_a_batch_longer_than_its_context():
    with pytest.raises(ValueError, match="a batch of 7 steps is longer than context=6"):
        make_model()(torch.zeros(T + 1, B, dtype=torch.long))


def test_refuses_data_of_another_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="vocab_size=11, but the data has 12 words"):
        make_trainer(tmp_path).fit(make_model(), Text(vocab_size=12))


def test_what_is_skipped_of_a_stock_encoder_layer():
    """Both sides between a block's linear layers, the rows of the second one, and the decoder's columns."""
    model = make_model(hidden_size=64, num_layers=1, rate=0.5, tie_weights=False)
    report = approximate(model, seed=0, min_gain=0)
    words = torch.randint(V, (T, B))
    F.cross_entropy(model(words).flatten(0, 1), words.flatten()).backward()
    assert {row.name: (row.producer, row.consumers) for row in report} == {
        "embedding_dropout": (None, ()),
        "layers.0.dropout": ("layers.0.linear1", ("layers.0.linear2",)),
        "layers.0.dropout1": (None, ()),
        "layers.0.dropout2": ("layers.0.linear2", ()),
        "decoder_dropout": (None, ("decoder",)),
    }
    assert report.saved > 0.2
    assert all(p.grad is not None for p in model.parameters())


def test_command_line_trains_resumes_and_skips(tmp_path, monkeypatch):
    overrides = [*SMALL["transformer"], *QUICK, "datamodule.source=synthetic"]
    unbounded = ["dropout.min_gain=0"]
    metrics, objects = train(config(tmp_path / "straight", *overrides, *unbounded, "trainer.max_epochs=2"))
    assert objects["result"]["test"] == metrics["test/ppl"] < 300  # the perplexity of guessing
    assert objects["result"]["unit"] == "tokens" and objects["result"]["per_second"] > 0
    report = objects["callbacks"]["dropout"].report
    assert report["layers.0.dropout"].producer == "layers.0.linear1"
    assert report["decoder_dropout"].consumers == ("decoder",)
    stopping = [*overrides, *unbounded, "test=false", "trainer.max_epochs=2"]

    def stop(self):
        raise RuntimeError("enough")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="enough"):
        patched.setattr(TransformerLanguageModel, "on_train_epoch_end", stop)
        train(config(tmp_path / "half", *stopping))
    (tmp_path / "half" / "checkpoints" / "last.ckpt").unlink(missing_ok=True)  # so that interrupted.ckpt is used
    _, resumed = train(config(tmp_path / "resumed", *stopping, f"ckpt_path={tmp_path / 'half'}"))
    assert resumed["trainer"].current_epoch == 2
    torch.testing.assert_close(
        last_weights(tmp_path / "resumed"), last_weights(tmp_path / "straight"), rtol=0, atol=0
    )


def test_experiments_of_the_treebank():
    whole, part = (config("x", f"experiment=ptb_transformer{suffix}") for suffix in ("", "_quick"))
    assert (whole.model.hidden_size, whole.model.num_layers, whole.model.context) == (256, 4, whole.datamodule.unroll)
    assert (part.model.hidden_size, part.datamodule.vocabulary, part.datamodule.fraction) == (256, 2000, 0.2)
    assert whole.trainer.gradient_clip_val == part.trainer.gradient_clip_val == 1.0
