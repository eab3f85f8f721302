"""SIGNClassifier: towers of stock layers, what is skipped, and that it learns from the graph."""

import pytest
import torch
from support.runs_of_train import QUICK, SMALL, config, last_weights
from torch.nn import functional as F

from approxdrop_lightning import approximate
from approxdrop_lightning.application.models import SIGNClassifier
from train import train

FULL = ["trainer.limit_train_batches=1.0", "trainer.limit_val_batches=1.0", "trainer.limit_test_batches=1.0"]
SKIP = ["dropout.min_gain=0"]


def make_model(**arguments):
    torch.manual_seed(0)
    return SIGNClassifier(**({"in_features": 6, "num_hops": 2, "num_classes": 4, "hidden_size": 64} | arguments))


def test_shapes_and_stock_layers():
    model = make_model(rate=0.3)
    assert model(torch.randn(5, 3, 6)).shape == (5, 4)
    assert len(model.towers) == 3
    assert model.head[0].in_features == 3 * 64
    parts = [part for part in model.modules() if part is not model]
    assert {type(part).__module__.split(".")[0] for part in parts} == {"torch"}
    assert [part.p for part in parts if isinstance(part, torch.nn.Dropout)] == [0.3] * (3 + 2)
    assert all(part.weight.numel() == 1 for part in parts if isinstance(part, torch.nn.PReLU))


def test_each_tower_reads_its_hop():
    model = make_model().eval()
    hops = torch.randn(5, 3, 6)
    made = [tower(hops[:, k]) for k, tower in enumerate(model.towers)]
    torch.testing.assert_close(model(hops), model.head(model.dropout(model.prelu(torch.cat(made, 1)))))
    other = hops.clone()
    other[:, 1] += 1
    assert not torch.allclose(model(hops), model(other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, r"dropout rate 1.0 is outside \[0, 1\)"),
        ({"num_hops": 0}, "num_hops must be .* got 0"),
        ({"hidden_size": 1.5}, "hidden_size must be .* got 1.5"),
        ({"num_classes": True}, "num_classes must be .* got True"),
    ],
)
def test_refuses_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model(**arguments)


def test_refuses_a_batch_of_other_hops():
    with pytest.raises(ValueError, match="the model has num_hops=2, the batch has 3"):
        make_model()(torch.randn(5, 4, 6))


def test_what_is_skipped():
    model = make_model()
    report = approximate(model, seed=0, min_gain=0)
    F.cross_entropy(model(torch.randn(24, 3, 6)), torch.randint(4, (24,))).backward()
    assert {row.name: (row.producer, row.consumers) for row in report} == {
        **{f"towers.{k}.2": (f"towers.{k}.0", (f"towers.{k}.3",)) for k in range(3)},
        "dropout": ("towers.0.3, towers.1.3, towers.2.3", ("head.0",)),
        "head.2": ("head.0", ("head.3",)),
    }
    assert report.saved > 0.6
    assert all(p.grad is not None for p in model.parameters())


def test_it_learns_and_resumes_with_a_partial_last_batch(tmp_path, monkeypatch):
    """A node's own features identify its community in one case of three, its neighbourhood in four of five."""
    overrides = [*SMALL["sign"], *QUICK, *FULL, *SKIP, "trainer.max_epochs=8", "dropout.rate=0.3"]
    metrics, objects = train(config(tmp_path / "straight", *overrides))
    sizes = [len(labels) for _, labels in objects["datamodule"].train_dataloader()]
    assert sizes == [250, 250, 250, 150]
    assert metrics["test/acc"] > 0.7
    assert objects["result"]["test"] == metrics["test/acc"]
    report = objects["callbacks"]["dropout"].report
    assert report["dropout"].consumers == ("head.0",) and report["head.2"].producer == "head.0"
    assert report.saved > 0.4

    def stop(self):
        if self.current_epoch == 3:
            raise RuntimeError("enough")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="enough"):
        patched.setattr(SIGNClassifier, "on_train_epoch_start", stop)
        train(config(tmp_path / "half", *overrides, "test=false"))
    _, resumed = train(config(tmp_path / "resumed", *overrides, "test=false", f"ckpt_path={tmp_path / 'half'}"))
    assert resumed["trainer"].current_epoch == 8
    torch.testing.assert_close(
        last_weights(tmp_path / "resumed"), last_weights(tmp_path / "straight"), rtol=0, atol=0
    )
