"""An LSTM language model in a custom training loop: ``python examples/language_model.py``."""

import argparse
import bz2
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from approxdrop_lightning import approximate, resample, restore

TEXT = Path(__file__).parents[1] / "datamodules" / "embedded" / "austen.train.txt.bz2"


class WordLSTM(nn.Module):
    """Embedding, LSTM, decoder, with dropout between them."""

    def __init__(self, words: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(words, hidden), nn.Dropout(rate)
        self.lstm, self.decoder = nn.LSTM(hidden, hidden, num_layers=2, dropout=rate), nn.Linear(hidden, words)

    def forward(self, words: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.dropout(self.embedding(words)))
        return self.decoder(self.dropout(hidden))


def streams(vocabulary: int, batch: int) -> Tensor:
    """Word indices of the text, with 0 for rare words, in ``batch`` columns: ``[T, batch]``."""
    words = bz2.decompress(TEXT.read_bytes()).decode().split()
    index = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    text = torch.tensor([index.get(word, 0) for word in words])
    return text[: len(text) // batch * batch].view(batch, -1).t().contiguous()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--backend", default="none", help="of torch.compile; none: eager")
    options = parser.parse_args()

    text, model = streams(options.vocabulary, batch=20), WordLSTM(options.vocabulary, options.hidden, rate=0.5)
    report = approximate(model, seed=0)  # before torch.compile
    forward = model if options.backend == "none" else torch.compile(model, backend=options.backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for step in range(options.steps):
        resample(model)
        part = text[step * 35 : step * 35 + 36]
        loss = nn.functional.cross_entropy(forward(part[:-1]).flatten(0, 1), part[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: perplexity {loss.exp():.0f}")
    print(report)
    restore(model)  # the stock layers again: evaluate, save, export
