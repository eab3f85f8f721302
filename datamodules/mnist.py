"""MNIST as whole tensors: loading a batch costs one gather."""

import os
import struct
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST

from datamodules import synthetic
from datamodules.loader import row_loader
from datamodules.source import EMBEDDED, check_at_least, check_source, data_folder, obtain

Part = tuple[Tensor, Tensor]

#: Images set aside for validation, of 60,000 from files, 5,500 embedded ones and 12,000 rendered ones.
VAL_SIZE = {"files": 5000, "embedded": 500, "synthetic": 2000}
MEAN, STD = 0.1307, 0.3081  # of the training images, on a scale of 0 to 1
# As torchvision names and the authors publish them: a header (magic number, then the shape), one byte per value.
HEADERS = {
    "train-images-idx3-ubyte": struct.pack(">4I", 0x803, 60_000, 28, 28),
    "train-labels-idx1-ubyte": struct.pack(">2I", 0x801, 60_000),
    "t10k-images-idx3-ubyte": struct.pack(">4I", 0x803, 10_000, 28, 28),
    "t10k-labels-idx1-ubyte": struct.pack(">2I", 0x801, 10_000),
}
SIZES = {
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}


class MNISTDataModule(LightningDataModule):
    """Batches ``(images[B, 1, 28, 28], labels[B])``; images are normalised float32.

    Validation is on a random part of the training images, always the same one. Its images are never trained on.
    What is embedded is a balanced part of the real data: 5,500 images of the training set, the last 500 of them for
    validation, and 500 of the test set.

    Args:
        data_dir: Folder with ``MNIST/raw`` as torchvision lays it out; default ``APPROXDROP_DATA`` or ``data``.
        source: ``"files"``, ``"download"``, ``"embedded"`` (6,000 real images), ``"auto"``: whichever of these is to
            be had first, with a warning if it is the last; or ``"synthetic"``: rendered digits.
        batch_size: Images per batch.
        num_workers: Processes that load; 0 is fastest, the images are in memory.
        train_limit: Train on so many images only.
        val_size: Images set aside for validation; None: 5,000 of the whole data set, 500 of what is embedded.
        seed: Of the split and of the synthetic images.

    Attributes:
        data_kind: ``"files"``, ``"embedded"`` or ``"synthetic"``; after ``setup``.
        data_source: Where the data came from, in words; after ``setup``.

    Raises:
        ValueError: For a value outside what is allowed, and in ``setup`` for a damaged file.
        FileNotFoundError: In ``setup``, if ``source="files"`` and there are none.
        ConnectionError: In ``setup``, if ``source="download"`` failed.
    """

    best_perplexity = None

    def __init__(
        self,
        data_dir: str | os.PathLike | None = None,
        source: str = "auto",
        batch_size: int = 128,
        num_workers: int = 0,
        train_limit: int | None = None,
        val_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data_dir, self.source = data_folder(data_dir), check_source(source)
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, num_workers=num_workers)
        for name, value in {"val_size": val_size, "train_limit": train_limit}.items():
            if value is not None:
                check_at_least(1, **{name: value})
        self.batch_size, self.num_workers = batch_size, num_workers
        self.train_limit, self.val_size, self.seed = train_limit, val_size, seed
        self.data_kind: str | None = None
        self.data_source: str | None = None

    def prepare_data(self) -> None:
        """Fetch the files if need be; what it found is found again by ``setup`` on the other processes."""
        _ = self._folder

    @cached_property
    def _folder(self) -> Path | None:
        """Of the real data; asked for once, so that a failed download is tried and warned of once."""
        return obtain("MNIST", self.source, self._find, str(self._raw), self._download, MNIST.mirrors[0])

    @property
    def _raw(self) -> Path:
        return self.data_dir / "MNIST" / "raw"

    def _find(self) -> Path | None:
        if not all((self._raw / name).is_file() for name in SIZES):
            return None
        for name, size in SIZES.items():
            found = (self._raw / name).stat().st_size
            if found != size:
                raise ValueError(f"{self._raw / name} is damaged: {size:,} bytes expected, {found:,} found")
            with (self._raw / name).open("rb") as file:
                header = file.read(len(HEADERS[name]))
            if header != HEADERS[name]:
                raise ValueError(
                    f"{self._raw / name} is damaged: header {HEADERS[name].hex()} expected, {header.hex()} found"
                )
        return self.data_dir

    def _download(self) -> Path:
        MNIST(str(self.data_dir), download=True)  # checks MD5s
        return self.data_dir

    def setup(self, stage: str | None = None) -> None:
        """Read all images into memory, once."""
        if self.data_source is not None:
            return
        kind, parts = self._read()
        (images, labels), self._test = parts
        val_size = self.val_size or VAL_SIZE[kind]
        if val_size >= len(images):
            raise ValueError(f"val_size must be below the {len(images):,} training images, got {val_size:,}")
        # What is embedded has an order in which both parts are balanced.
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.arange(len(images)) if kind == "embedded" else torch.randperm(len(images), generator=generator)
        train, val = order[:-val_size], order[-val_size:]
        train = train[: self.train_limit]
        self._train, self._val = (images[train], labels[train]), (images[val], labels[val])
        self.data_kind = kind
        self.data_source = {
            "files": f"files ({self.data_dir.absolute()})",
            "embedded": f"MNIST, a part ({len(train):,} images, embedded)",
            "synthetic": "synthetic (rendered digits)",
        }[kind]

    def _read(self) -> tuple[str, list[Part]]:
        """Kind of the data; training and test part."""
        if (folder := self._folder) is not None:
            return "files", [_read_files(folder, train) for train in (True, False)]
        if self.source == "synthetic":
            return "synthetic", [(normalise(images), labels) for images, labels in synthetic.digits(self.seed)]
        return "embedded", _read_embedded()

    def train_dataloader(self) -> DataLoader:
        """Shuffled anew in each epoch; the order follows from ``seed_everything``."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self._loader(self._val)

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return self._loader(self._test)

    def _loader(self, part: tuple[Tensor, Tensor], shuffle: bool = False) -> DataLoader:
        return row_loader(part, self.batch_size, shuffle, self.num_workers)


def _read_embedded() -> list[Part]:
    with np.load(EMBEDDED / "mnist_part.npz") as arrays:
        part = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return [(normalise(part[f"{name}_images"]), part[f"{name}_labels"].to(torch.int64)) for name in ("train", "test")]


def _read_files(folder: Path, train: bool) -> Part:
    data = MNIST(str(folder), train=train)
    if (highest := int(data.targets.max())) > 9:
        file = folder / "MNIST" / "raw" / f"{'train' if train else 't10k'}-labels-idx1-ubyte"
        raise ValueError(f"{file} is damaged: labels from 0 to 9 expected, {highest} found")
    return normalise(data.data), data.targets.to(torch.int64)


def normalise(images: Tensor) -> Tensor:
    """``[N, 28, 28]`` from 0 to 255 to float32 ``[N, 1, 28, 28]`` of mean 0 and deviation 1, as MNIST's are."""
    return (images.to(torch.float32).unsqueeze(1) / 255 - MEAN) / STD
