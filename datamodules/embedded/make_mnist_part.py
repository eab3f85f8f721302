"""Create ``mnist_part.npz`` from MNIST: ``python datamodules/embedded/make_mnist_part.py FOLDER_WITH_MNIST``."""

import sys
from pathlib import Path

import numpy as np
from torchvision.datasets import MNIST

SEED = 0
COUNTS = {"train": (500, 50), "test": (50,)}  # images per digit, in separately shuffled blocks


def make(folder: str) -> dict[str, np.ndarray]:
    """Images ``[N, 28, 28]`` and labels ``[N]``, uint8: 5,000 and 500 of the training set, 500 of the test set.

    The images of each digit are equally spaced, because MNIST is ordered by writer and the first half of its test set
    is easier.

    Args:
        folder: Folder that contains ``MNIST/raw`` in torchvision's layout.
    """
    dice = np.random.default_rng(SEED)
    arrays = {}
    for part, counts in COUNTS.items():
        data = MNIST(folder, train=part == "train")
        images, labels = data.data.numpy(), data.targets.numpy().astype(np.uint8)
        of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
        spread = [places[np.linspace(0, len(places) - 1, sum(counts)).astype(int)] for places in of_digit]
        spread = [dice.permutation(places) for places in spread]
        chosen, taken = [], 0
        for count in counts:
            block = np.concatenate([places[taken : taken + count] for places in spread])
            chosen.append(dice.permutation(block))
            taken += count
        order = np.concatenate(chosen)
        arrays |= {f"{part}_images": images[order], f"{part}_labels": labels[order]}
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("mnist_part.npz"), **make(sys.argv[1]))
