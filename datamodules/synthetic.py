"""Generated data for tests: rendered digits, and text from a source of known entropy.

Both are seeded and do not use the global random state.
"""

import random
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

Part = tuple[Tensor, Tensor]


def digits(seed: int, train: int = 12_000, test: int = 2_000) -> tuple[Part, Part]:
    """Render digits with varying sizes, slants, positions and intensities, blurred and noisy.

    Args:
        seed: Seed of all randomness.
        train: Number of training images.
        test: Number of test images.

    Returns:
        ``((images, labels), (images, labels))``: float32 ``[N, 28, 28]`` from 0 to 255, and int64 ``[N]``.
    """
    dice = random.Random(seed)
    fonts = [ImageFont.load_default(size) for size in range(14, 27, 2)]
    labels = [dice.randrange(10) for _ in range(train + test)]
    images = torch.stack([_digit(label, dice, fonts) for label in labels])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed % 2**64))
    images = (images + 35 * noise).clamp(0, 255)
    targets = torch.tensor(labels)
    return (images[:train], targets[:train]), (images[train:], targets[train:])


def _digit(label: int, dice: random.Random, fonts: list[ImageFont.FreeTypeFont]) -> Tensor:
    image = Image.new("L", (28, 28))
    place = (14 + dice.uniform(-3, 3), 14 + dice.uniform(-3, 3))
    strength = dice.randint(90, 255)
    ImageDraw.Draw(image).text(
        place,
        str(label),
        fill=strength,
        font=dice.choice(fonts),
        anchor="mm",
        stroke_width=dice.randint(0, 1),
    )
    image = image.rotate(dice.uniform(-30, 30), Image.Resampling.BILINEAR)
    if dice.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(dice.uniform(0.3, 1.0)))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(28, 28).float()


@dataclass(frozen=True)
class WordSource:
    """A first-order Markov source of words with Zipfian frequencies.

    With probability ``memory`` the next word is drawn from a few successors of the previous one (each word has its
    own, with Zipfian weights), and otherwise from a Zipf distribution over all words (the k-th most frequent word has
    probability proportional to 1/k).

    Attributes:
        start: Distribution of words without a predecessor, float64 ``[V]``.
        transitions: Distribution of the next word after each word, float64 ``[V, V]``.
    """

    start: Tensor
    transitions: Tensor

    @classmethod
    def make(cls, seed: int, vocabulary: int = 1000, successors: int = 8, memory: float = 0.7) -> "WordSource":
        """Create the source for a seed."""
        generator = torch.Generator().manual_seed(seed % 2**64)
        successors = min(successors, vocabulary)
        start = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
        start /= start.sum()
        weights = 1 / torch.arange(1, successors + 1, dtype=torch.float64)
        chosen = torch.multinomial(start.expand(vocabulary, -1), successors, generator=generator)
        local = torch.zeros(vocabulary, vocabulary, dtype=torch.float64)
        local.scatter_(1, chosen, (weights / weights.sum()).expand(vocabulary, -1))
        return cls(start, memory * local + (1 - memory) * start)

    @property
    def stationary(self) -> Tensor:
        """Long-run word frequencies, float64 ``[V]``."""
        frequencies = self.start
        for _ in range(200):  # the influence of the start decays by `memory` per step: 0.7^200 is 1e-31
            frequencies = frequencies @ self.transitions
        return frequencies

    @property
    def entropy(self) -> float:
        """Entropy rate in nats per word: the loss that no model can beat in expectation."""
        per_word = torch.special.entr(self.transitions).sum(1)
        return float(self.stationary @ per_word)

    def text(self, length: int, seed: int) -> Tensor:
        """Draw a text, int64 ``[length]``, starting from the stationary distribution."""
        dice = torch.rand(length, generator=torch.Generator().manual_seed(seed % 2**64), dtype=torch.float64)
        cumulative = self.transitions.cumsum(1)
        words = torch.empty(length, dtype=torch.int64)
        word = int(torch.searchsorted(self.stationary.cumsum(0), dice[0]).clamp(max=len(self.start) - 1))
        words[0] = word
        # Row by row: the next word depends on the last.
        for i, u in enumerate(dice[1:].tolist(), start=1):
            word = min(int(torch.searchsorted(cumulative[word], u)), len(self.start) - 1)
            words[i] = word
        return words
