"""LightningCLI finds the callback by name once the package is imported.

``python examples/cli.py fit --trainer.callbacks+=ApproxDropout --trainer.callbacks.rate=0.7 --trainer.max_epochs=1``
"""

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import approxdrop_lightning  # noqa: F401  (makes the callback known)


class Autoencoder(LightningModule):
    """Wide layers with dropout between them.

    Args:
        width: Width of the hidden layers.
        rate: Dropout rate, unless the callback sets one.
        size: Number of samples.
    """

    def __init__(self, width: int = 1024, rate: float = 0.5, size: int = 12_800) -> None:
        super().__init__()
        self.size = size
        self.encoder = nn.Sequential(nn.Linear(784, width), nn.GELU(), nn.Dropout(rate))
        self.decoder = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(rate), nn.Linear(width, 784))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (inputs,) = batch
        return nn.functional.mse_loss(self.decoder(self.encoder(inputs)), inputs)

    def train_dataloader(self) -> DataLoader:
        inputs = torch.randn(self.size, 16) @ torch.randn(16, 784)  # of rank 16, so that there is something to learn
        return DataLoader(TensorDataset(inputs), batch_size=128, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    LightningCLI(Autoencoder, save_config_callback=None)
