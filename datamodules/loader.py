"""Data loading that resumes within an epoch, at exactly the next batch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler


class ResumableLoader(DataLoader):
    """A ``DataLoader`` whose position within the epoch is saved in the Trainer's checkpoints.

    Lightning saves and restores the state of loaders that have one. With a plain ``DataLoader``, a run resumed
    mid-epoch would start that epoch's data from the beginning.
    """

    _seen = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:
        skip, self._skip = self._skip % max(1, len(self)), 0
        for self._seen, batch in enumerate(super().__iter__(), start=1):
            if self._seen > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Number of batches yielded in this epoch."""
        return {"batches": self._seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip, in the next epoch, the batches that were already yielded."""
        self._skip = state["batches"]


class EpochSampler(Sampler[int]):
    """A random order that depends only on seed and epoch, and is therefore reproducible.

    Lightning calls ``set_epoch``.

    Args:
        size: Number of samples.
        seed: Seed for all epochs.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        # The CPU generator uses only 32 bits of a seed; neighbouring seeds must not share epochs.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**32)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class TensorRows(Dataset[tuple[Tensor, ...]]):
    """In-memory tensors with the same number of rows. A batch is one gather per tensor, without collation."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        chosen = torch.tensor(indices)
        return tuple(tensor[chosen] for tensor in self.tensors)


def row_loader(
    tensors: tuple[Tensor, ...], batch_size: int, shuffle: bool = False, num_workers: int = 0
) -> ResumableLoader:
    """Loader for the rows of in-memory tensors; the last batch of an epoch may be smaller.

    Args:
        tensors: Tensors with the same number of rows.
        batch_size: Rows per batch.
        shuffle: Whether to reshuffle in each epoch; the order then follows from ``seed_everything``.
        num_workers: Number of loading processes.
    """
    rows = TensorRows(*tensors)
    sampler = EpochSampler(len(rows), torch.initial_seed() % 2**31) if shuffle else SequentialSampler(rows)
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    return ResumableLoader(rows, batch_sampler=batches, num_workers=num_workers, collate_fn=_as_it_is)


def _as_it_is(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return batch
