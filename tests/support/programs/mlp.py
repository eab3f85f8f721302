"""An MLP classifier as Lightning's introduction writes it; the callback is the only addition."""

import lightning as L
import torch
from torch import nn, optim, utils

from approxdrop_lightning import ApproxDropout


class LitClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(784, 1024), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(0.5)
        )
        self.head = nn.Linear(1024, 4)

    def forward(self, x):
        return self.head(self.backbone(x.view(x.size(0), -1)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return optim.Adam(self.parameters(), lr=1e-3)


def images(n):
    labels = torch.arange(n) % 4
    return utils.data.TensorDataset(torch.randn(n, 28, 28) + labels[:, None, None] * 0.1, labels)


if __name__ == "__main__":
    L.seed_everything(0)
    train, val = (utils.data.DataLoader(images(n), batch_size=128) for n in (1280, 128))
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ApproxDropout()]
    )
    model = LitClassifier()
    before = trainer.validate(model, val)[0]["val_loss"]
    trainer.fit(model, train, val)
    print(f"val_loss {before:.4f} -> {trainer.validate(model, val)[0]['val_loss']:.4f}")
