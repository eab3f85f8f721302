"""MNIST as in-memory tensors: loading a batch is a single gather."""

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

#: Validation images by source, out of 60,000 from files, 5,500 embedded and 12,000 rendered ones.
VAL_SIZE = {"files": 5000, "embedded": 500, "synthetic": 2000}
MEAN, STD = 0.1307, 0.3081  # of the training images, scaled to [0, 1]
# File names as in torchvision. The published format is a header (magic number, then shape) and one byte per value.
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

    The validation set is a fixed random part of the training images, which is never trained on. The embedded data is
    a balanced part of the real data: 5,500 images of the training set, the last 500 of them for validation, and 500
    of the test set.

    Args:
        data_dir: Folder with ``MNIST/raw`` in torchvision's layout; default ``APPROXDROP_DATA`` or ``data``.
        source: ``"files"``, ``"download"``, ``"embedded"`` (6,000 real images), ``"auto"`` for the first of these
            that is available, with a warning if it is the last, or ``"synthetic"`` for rendered digits.
        batch_size: Images per batch.
        num_workers: Number of loading processes; 0 is fastest, since the images are in memory.
        train_limit: Maximum number of images to train on.
        val_size: Number of validation images; None for 5,000 of the whole data set or 500 of the embedded one.
        seed: Seed of the split and of the synthetic images.

    Attributes:
        data_kind: ``"files"``, ``"embedded"`` or ``"synthetic"``; set by ``setup``.
        data_source: Description of where the data came from; set by ``setup``.

    Raises:
        ValueError: An argument is out of range or, in ``setup``, a file is damaged.
        FileNotFoundError: In ``setup``, with ``source="files"``, if the files are missing.
        ConnectionError: In ``setup``, with ``source="download"``, if the download failed.
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
        """Download the files if necessary; ``setup`` finds them again in the other processes."""
        _ = self._folder

    @cached_property
    def _folder(self) -> Path | None:
        """Folder of the real data; cached, so that a failed download is attempted and reported only once."""
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
        MNIST(str(self.data_dir), download=True)  # verifies MD5 checksums
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
        # The embedded images are ordered such that both parts are balanced.
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
        """Return the kind of the data, and its training and test part."""
        if (folder := self._folder) is not None:
            return "files", [_read_files(folder, train) for train in (True, False)]
        if self.source == "synthetic":
            return "synthetic", [(normalise(images), labels) for images, labels in synthetic.digits(self.seed)]
        return "embedded", _read_embedded()

    def train_dataloader(self) -> DataLoader:
        """Training batches, reshuffled in each epoch; the order follows from ``seed_everything``."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation batches, in order."""
        return self._loader(self._val)

    def test_dataloader(self) -> DataLoader:
        """Test batches, in order."""
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
    """Normalise ``[N, 28, 28]`` in 0 to 255 by MNIST's mean and deviation, to float32 ``[N, 1, 28, 28]``."""
    return (images.to(torch.float32).unsqueeze(1) / 255 - MEAN) / STD
