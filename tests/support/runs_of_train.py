"""Small runs of ``train.py``: overrides, configurations, command lines."""

import sys

import torch
from hydra import compose, initialize_config_dir

from approxdrop_lightning.application.config import register
from support import ROOT

register()

# Small, but wide enough (64 units) that the callback does not leave the layers as they are.
SMALL = {
    "mlp": ["model.hidden=[96,64]", "datamodule.val_size=500"],
    "lstm": [
        *("model=lstm", "model.hidden_size=64", "model.init_range=0.1"),
        *("datamodule.batch_size=10", "datamodule.unroll=12"),
        *("datamodule.vocabulary=300", "datamodule.fraction=0.1"),
    ],
    "transformer": [
        *("model=transformer", "model.hidden_size=64", "model.num_layers=1", "model.num_heads=2"),
        *("datamodule.batch_size=10", "datamodule.unroll=12", "model.warmup_steps=5"),
        *("datamodule.vocabulary=300", "datamodule.fraction=0.1"),
    ],
    "sign": [
        *("model=sign", "model.hidden_size=64", "datamodule.nodes=1500", "datamodule.in_features=24"),
        *("datamodule.num_classes=5", "datamodule.batch_size=250", "model.optimizer.lr=0.01"),
    ],
    "ctr": [
        *("model=ctr", "model.hidden=[96,64]", "model.embedding_size=4", "datamodule.batch_size=256"),
        *("datamodule.field_sizes=[3,5,10]", "datamodule.train_size=4000", "datamodule.val_size=1000"),
    ],
}


QUICK = [
    *("debug=fast", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"),
    *("callbacks.throughput.warmup_steps=5", "callbacks.throughput.window_size=5"),
]


def config(run_dir, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [f"run_dir={run_dir}", "trainer.accelerator=cpu", *overrides])


def command(*overrides):
    return [sys.executable, str(ROOT / "train.py"), "trainer.accelerator=cpu", *overrides]


def weights(objects):
    return {key: value.cpu() for key, value in objects["model"].state_dict().items()}


def last_weights(run_dir):
    """Weights after the last epoch; after testing, the model has those of the best epoch."""
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
