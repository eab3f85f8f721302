"""torchvision's vision transformer in a LightningModule; the callback is the only addition."""

import lightning as L
import torch
from torchvision.models import VisionTransformer

from approxdrop_lightning import ApproxDropout


class LitViT(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = VisionTransformer(
            image_size=16,
            patch_size=4,
            num_layers=2,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=256,
            dropout=0.2,
            num_classes=3,
        )

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def images(n):
    labels = torch.arange(n) % 3
    x = torch.randn(n, 3, 16, 16)
    x[torch.arange(n), labels] += 1.0
    return torch.utils.data.TensorDataset(x, labels)


if __name__ == "__main__":
    L.seed_everything(0)
    train, val = (torch.utils.data.DataLoader(images(n), batch_size=30) for n in (600, 90))
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[ApproxDropout(min_gain=0)],
    )
    model = LitViT()
    before = trainer.validate(model, val)[0]["val_loss"]
    trainer.fit(model, train, val)
    print(f"val_loss {before:.4f} -> {trainer.validate(model, val)[0]['val_loss']:.4f}")
