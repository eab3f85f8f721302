"""A LightningModule with ordinary dropout, plus one callback: ``python examples/lightning_mlp.py``."""

import argparse

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from approxdrop_lightning import ApproxDropout, ThroughputLogger


class WideMLP(LightningModule):
    """784-1024-1024-10; independent of the callback."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(784, 1024), nn.ReLU(), nn.Dropout(rate)),
            *(nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(rate)),
            nn.Linear(1024, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def data(size: int) -> DataLoader:
    """Inputs of ten noisy classes; replace with your own."""
    labels = torch.randint(10, (size,))
    inputs = torch.randn(10, 784)[labels] + 3 * torch.randn(size, 784)
    return DataLoader(TensorDataset(inputs, labels), batch_size=128, shuffle=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=12_800, help="of the data")
    parser.add_argument("--conventional", action="store_true", help="without the callback")
    options = parser.parse_args()

    dropout, speed = ApproxDropout(), ThroughputLogger(warmup_steps=2)  # the clock comes first, to include drawing
    callbacks = [speed] if options.conventional else [speed, dropout]
    trainer = Trainer(max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(WideMLP(options.rate), data(options.size))
    print(dropout.report or "conventional dropout")
    print(f"{speed.summary['samples_per_sec']:,.0f} samples per second")
