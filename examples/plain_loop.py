"""A plain PyTorch loop, and a checkpoint of its model: ``python examples/plain_loop.py``."""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from approxdrop_lightning import approximate, resample, restore


def batch() -> tuple[Tensor, Tensor]:
    """Inputs and labels; replace with your own."""
    inputs = torch.randn(128, 784)
    return inputs, inputs[:, :10].argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Mean loss over the steps."""
    total = 0.0
    for _ in range(steps):
        resample(model)  # a new pattern for each step
        inputs, labels = batch()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=0.5)
    options = parser.parse_args()

    hidden = [nn.Linear(784, 1024), nn.ReLU(), nn.Dropout(options.rate)]
    model = nn.Sequential(*hidden, nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(options.rate), nn.Linear(1024, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    report = approximate(model, seed=0)
    print(f"loss {train(model, optimizer, options.steps):.3f}")
    print(report)

    # The state_dict has the stock model's keys, converted or not.
    checkpoint = Path(tempfile.mkdtemp()) / "model.pt"
    torch.save(model.state_dict(), checkpoint)
    restore(model)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    inputs, labels = batch()
    print(f"accuracy {(model.eval()(inputs).argmax(1) == labels).float().mean():.0%}")
