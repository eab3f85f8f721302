"""Compiled models in two processes: the same pairs on both, patterns of their own, the same weights."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support import ROOT, TESTS

SCRIPT = """
import json, sys
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from support.lightning_nets import data
from approxdrop_lightning import ApproxDropout
from approxdrop_lightning.graph.counts import COUNTS
from approxdrop_lightning.graph.rewrite import rewrite

given = json.loads(sys.argv[1])
# Otherwise a megabyte, which no small model fills.
torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = min(1 << 20, int(given["bucket"] * (1 << 20)))

def backend(gm, inputs):
    rewrite(gm)
    return lookup_backend("aot_eager")(gm, inputs)

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 48), nn.ReLU(),
                                 nn.Dropout(0.5), nn.Linear(48, 3))

    def forward(self, x):
        if not given["calls"]:
            return self.net(x)
        for layer in (self.net[0], self.net[3]):
            x = nn.functional.dropout(layer(x).relu(), 0.5, self.training)
        return self.net[6](x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)

class Dump(Callback):
    def __init__(self):
        self.steps, self.losses = [], []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        sites = callback.report.sites
        book = sites[0].book()
        tables = [p.use.place(p.table).tolist() for site in sites for p in site.last_patterns]
        self.steps.append([[book.pair(site) for site in sites], tables])
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, module):
        torch.save({"steps": self.steps, "losses": self.losses, "weights": dict(module.state_dict()),
                    "consumers": COUNTS.consumers / COUNTS.graphs,
                    "parts": COUNTS.graphs / counters["stats"]["unique_graphs"],
                    "graphs": counters["stats"]["unique_graphs"], "pairs": callback.report.sites[0].book().graphs},
                   f"{given['out']}/rank{trainer.global_rank}.pt")

if __name__ == "__main__":
    seed_everything(0)
    model = Net()
    if given["calls"]:
        model.net[2] = model.net[5] = nn.Identity()
    model.compile(backend=backend)
    callback = ApproxDropout(min_gain=0, rate=0.7, sync_patterns=given["sync"])
    strategy = DDPStrategy(bucket_cap_mb=given["bucket"], process_group_backend="gloo")
    trainer = Trainer(max_epochs=6, accelerator="cpu", devices=2, strategy=strategy, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      callbacks=[callback, Dump()])
    trainer.fit(model, data(8))
"""


@pytest.mark.parametrize(
    ("sync", "bucket", "calls"), [(True, 25, False), (False, 0.005, False), (False, 0.005, True)]
)
def test_two_processes(sync, bucket, calls, tmp_path):
    """Gradients are gathered in one bucket, or in several: at their ends DDP cuts the graph before the pass.

    Dropouts are layers, or ``F.dropout``.
    """
    script = tmp_path / "ddp.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    given = json.dumps({"out": str(tmp_path), "sync": sync, "bucket": bucket, "calls": calls})
    run = subprocess.run(
        [sys.executable, str(script), given],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    # In buckets, one of two layers is cut off from the dropout before it.
    assert first["consumers"] * first["parts"] == (2 if bucket == 25 else 1)
    assert first["parts"] == (1 if bucket == 25 else 2)
    assert first["graphs"] <= first["pairs"]
    assert len(first["steps"]) == 36
    for a, b in zip(first["steps"], second["steps"], strict=True):
        assert a[0] == b[0]
        assert (a[1] == b[1]) == sync
    assert (len({str(pairs) for pairs, _ in first["steps"]}) > 1) != calls  # calls have one pair
    assert len({str(tables) for _, tables in first["steps"]}) == 36
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key])
    assert sum(first["losses"][-6:]) < sum(first["losses"][:6])
