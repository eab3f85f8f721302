"""A small LightningModule with one dropout, its data, and a callback that records the patterns."""

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, lr=0.1, batch_size=16):
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 3))

    def training_step(self, batch, batch_idx, dataloader_idx=0):
        batches = batch if isinstance(batch[0], (list, tuple)) else [batch]
        return sum(nn.functional.cross_entropy(self.net(x), y) for x, y in batches)

    def validation_step(self, batch, batch_idx):
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self):
        return data(self.batch_size)

    def val_dataloader(self):
        return data()


def data(batch_size=16, n=96):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 20, generator=generator), torch.randint(3, (n,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


class Patterns(Callback):
    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, *_):
        self.seen.append(self.callback.report.sites[0].last_patterns)
