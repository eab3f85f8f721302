"""A word language model with nn.LSTM, batch first, as many projects write it; the callback is the only addition."""

import lightning as L
import torch
from torch import nn

from approxdrop_lightning import ApproxDropout


class LitLanguageModel(L.LightningModule):
    def __init__(self, vocab_size=1500, width=128):
        super().__init__()
        self.encoder = nn.Embedding(vocab_size, width)
        self.drop = nn.Dropout(0.5)
        self.rnn = nn.LSTM(width, width, num_layers=2, dropout=0.5, batch_first=True)
        self.decoder = nn.Linear(width, vocab_size)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, words):
        output, _ = self.rnn(self.drop(self.encoder(words)))
        return self.decoder(self.drop(output))

    def _loss(self, words):
        logits = self(words[:, :-1])
        return self.criterion(logits.reshape(-1, logits.size(-1)), words[:, 1:].reshape(-1))

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def sentences(n):
    start = torch.randint(50, (n, 1))
    return (start + torch.arange(16) * 3) % 50


if __name__ == "__main__":
    L.seed_everything(0)
    train, val = (torch.utils.data.DataLoader(sentences(n), batch_size=20) for n in (800, 100))
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ApproxDropout()]
    )
    model = LitLanguageModel()
    before = trainer.validate(model, val)[0]["val_loss"]
    trainer.fit(model, train, val)
    print(f"val_loss {before:.4f} -> {trainer.validate(model, val)[0]['val_loss']:.4f}")
