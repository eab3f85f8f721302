"""Clicks on advertisements, as a factorisation machine would decide them."""

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.loader import row_loader
from datamodules.source import check_at_least

FIELD_SIZES = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) * 2
_RANK = 8  # of the interactions


class ClickDataModule(LightningDataModule):
    """Batches ``(numbers[B, in_features], fields[B, F], clicked[B])`` from a rule that is known.

    The values of each categorical field have Zipfian frequencies. The log-odds of a click are those of a
    factorisation machine (Rendle 2010): a weight of each value, products of vectors of each pair of values, and the
    numbers' weights. Whether somebody clicks is drawn from them, so that no model predicts it for sure.

    Args:
        field_sizes: Number of values of each categorical field; None for twenty fields of 2 to 2,000.
        in_features: Number of numeric features, normal.
        train_size: Rows to train on.
        val_size: Rows to validate on; as many test.
        spread: Deviation of the log-odds.
        batch_size: Rows of a batch.
        seed: Of rule and rows.

    Attributes:
        data_source: What the data is; after ``setup``.
        best_loss: Cross-entropy in nats of the rule itself on the test rows: what a model can hope for; after
            ``setup``.

    Raises:
        ValueError: For a value outside what is allowed.
    """

    best_perplexity = None

    def __init__(
        self,
        field_sizes: list[int] | None = None,
        in_features: int = 8,
        train_size: int = 200_000,
        val_size: int = 20_000,
        spread: float = 2.0,
        batch_size: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.field_sizes = [
            *([2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000] * 2 if field_sizes is None else field_sizes)
        ]
        if not self.field_sizes:
            raise ValueError("field_sizes must name at least one field, got []")
        check_at_least(1, **{f"field_sizes[{i}]": size for i, size in enumerate(self.field_sizes)})
        check_at_least(0, in_features=in_features)
        check_at_least(1, train_size=train_size, val_size=val_size, batch_size=batch_size)
        if not spread >= 0:
            raise ValueError(f"spread must not be negative, got {spread!r}")
        self.in_features, self.train_size, self.val_size, self.spread = in_features, train_size, val_size, spread
        self.batch_size, self.seed = batch_size, seed
        self.data_source: str | None = None
        self.best_loss: float | None = None

    def setup(self, stage: str | None = None) -> None:
        """Make the rule and draw all rows, once."""
        if self.data_source is not None:
            return
        generator = torch.Generator().manual_seed(self.seed)
        rows = self.train_size + 2 * self.val_size
        numbers = torch.randn(rows, self.in_features, generator=generator)
        fields = torch.stack([_zipfian(size, rows, generator) for size in self.field_sizes], dim=1)
        log_odds = self._rule(numbers, fields, generator)
        clicked = (torch.rand(rows, generator=generator) < log_odds.sigmoid()).long()
        sizes = [self.train_size, self.val_size, self.val_size]
        self._train, self._val, self._test = zip(
            *(part.split(sizes) for part in (numbers, fields, clicked)), strict=True
        )
        p = log_odds[-self.val_size :].sigmoid().double()
        self.best_loss = float((torch.special.entr(p) + torch.special.entr(1 - p)).mean())
        self.data_source = f"synthetic (a factorisation machine of {len(self.field_sizes)} fields)"

    def _rule(self, numbers: Tensor, fields: Tensor, generator: torch.Generator) -> Tensor:
        """Log-odds of a click, of mean -1 and deviation ``spread``."""
        linear = numbers @ torch.randn(self.in_features, generator=generator)
        total, squares = torch.zeros(len(fields), _RANK), torch.zeros(len(fields), _RANK)
        for size, values in zip(self.field_sizes, fields.unbind(1), strict=True):
            linear += torch.randn(size, generator=generator)[values]
            vectors = torch.randn(size, _RANK, generator=generator)[values]
            total += vectors
            squares += vectors.square()
        # The sum of the products of all pairs.
        pairs = (total.square() - squares).sum(1) / 2
        odds = _normalised(linear) + _normalised(pairs)
        return _normalised(odds) * self.spread - 1

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew in each epoch; the order follows from ``seed_everything``."""
        return row_loader(self._train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return row_loader(self._val, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return row_loader(self._test, self.batch_size)


def _zipfian(size: int, rows: int, generator: torch.Generator) -> Tensor:
    """Values of a field: the k-th has probability proportional to 1/k."""
    cumulative = (1 / torch.arange(1, size + 1)).cumsum(0)
    drawn = torch.rand(rows, generator=generator) * cumulative[-1]
    return torch.searchsorted(cumulative, drawn).clamp(max=size - 1)


def _normalised(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std().clamp(min=1e-6)
