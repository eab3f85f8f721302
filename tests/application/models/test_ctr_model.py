"""ClickModel: stock layers with and without batch norm, what is skipped, and that it learns the rule."""

import pytest
import torch
from support.runs_of_train import QUICK, SMALL, config, last_weights
from torch.nn import functional as F
from torchmetrics import Metric

from approxdrop_lightning import approximate
from approxdrop_lightning.application.models import ClickModel
from train import train

FULL = ["trainer.limit_train_batches=1.0", "trainer.limit_val_batches=1.0", "trainer.limit_test_batches=1.0"]
SKIP = ["dropout.min_gain=0"]


def make_model(**arguments):
    torch.manual_seed(0)
    return ClickModel(
        **({"field_sizes": [3, 4], "in_features": 2, "embedding_size": 5, "hidden": [64, 80]} | arguments)
    )


def batch(rows=24):
    generator = torch.Generator().manual_seed(0)
    fields = torch.stack([torch.randint(size, (rows,), generator=generator) for size in (3, 4)], dim=1)
    return torch.randn(rows, 2, generator=generator), fields, torch.randint(2, (rows,), generator=generator)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_shapes_and_stock_layers(batch_norm):
    model = make_model(rate=0.3, batch_norm=batch_norm)
    numbers, fields, _ = batch(7)
    assert model(numbers, fields).shape == (7,)
    assert make_model(in_features=0)(numbers[:, :0], fields).shape == (7,)
    assert model.net[0].in_features == 2 + 2 * 5
    parts = [part for part in model.modules() if part is not model and not isinstance(part, Metric)]
    assert {type(part).__module__.split(".")[0] for part in parts} == {"torch"}
    assert [part.p for part in parts if isinstance(part, torch.nn.Dropout)] == [0.3, 0.3]
    assert sum(isinstance(part, torch.nn.BatchNorm1d) for part in parts) == (2 if batch_norm else 0)


def test_every_field_has_values_of_its_own():
    """All values share a table: the first field has rows 0 to 2, the second one rows 3 to 6."""
    model = make_model()
    model(torch.zeros(1, 2), torch.tensor([[2, 0]])).backward()
    assert model.embedding.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": -0.1}, r"dropout rate -0.1 is outside \[0, 1\)"),
        ({"field_sizes": []}, "field_sizes must name at least one size"),
        ({"field_sizes": [3, 0]}, r"field_sizes\[1\] must be .* got 0"),
        ({"hidden": []}, "hidden must name at least one size"),
        ({"in_features": -1}, "in_features must be .* got -1"),
        ({"embedding_size": 0}, "embedding_size must be .* got 0"),
    ],
)
def test_refuses_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_what_is_skipped(batch_norm):
    """Batch norm reads all units of the layer before it, so only columns of the next layer are skipped."""
    model = make_model(batch_norm=batch_norm, rate=0.5)
    report = approximate(model, seed=0, min_gain=0)
    numbers, fields, clicked = batch()
    F.binary_cross_entropy_with_logits(model(numbers, fields), clicked.float()).backward()
    found = [(row.producer, row.consumers) for row in report]
    if batch_norm:
        assert found == [(None, ("net.4",)), (None, ("net.8",))]
        assert [row.whole for row in report] == ["read whole by BatchNorm1d"] * 2
    else:
        assert found == [("net.0", ("net.3",)), ("net.3", ("net.6",))]
    assert report.saved > (0.3 if batch_norm else 0.5)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("batch_norm", ["false", "true"])
def test_it_learns_and_resumes_with_a_partial_last_batch(tmp_path, monkeypatch, batch_norm):
    overrides = [*SMALL["ctr"], *QUICK, *FULL, *SKIP, "trainer.max_epochs=4", "dropout.rate=0.3"]
    overrides += [f"model.batch_norm={batch_norm}", "model.optimizer.lr=0.01"]
    metrics, objects = train(config(tmp_path / "straight", *overrides))
    sizes = [len(clicked) for *_, clicked in objects["datamodule"].train_dataloader()]
    assert sizes[-2:] == [256, 160]
    assert metrics["test/auc"] > 0.7
    # Close to the rule itself; knowing only the share of clicks gives about .61.
    assert objects["datamodule"].best_loss < metrics["test/loss"] < objects["datamodule"].best_loss + 0.12
    assert objects["result"]["test"] == metrics["test/auc"]
    assert objects["callbacks"]["dropout"].report.saved > 0.1

    def stop(self):
        if self.current_epoch == 2:
            raise RuntimeError("enough")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="enough"):
        patched.setattr(ClickModel, "on_train_epoch_start", stop)
        train(config(tmp_path / "half", *overrides, "test=false"))
    _, resumed = train(config(tmp_path / "resumed", *overrides, "test=false", f"ckpt_path={tmp_path / 'half'}"))
    assert resumed["trainer"].current_epoch == 4
    torch.testing.assert_close(
        last_weights(tmp_path / "resumed"), last_weights(tmp_path / "straight"), rtol=0, atol=0
    )
