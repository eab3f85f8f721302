"""Readers of arbitrarily modified files return correct data or raise an error that names the file."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from support.fuzz import came_of_it, examples, fuzz

from datamodules import MNISTDataModule, PTBDataModule
from datamodules import mnist as mnist_module
from datamodules import ptb as ptb_module

REAL = Path(os.environ.get("APPROXDROP_DATA", "/nonexistent"))
pytestmark = pytest.mark.skipif(not (REAL / "ptb").is_dir(), reason="APPROXDROP_DATA names no folder with ptb/")
#: Modifications of a file: position (as a share), operation, number of bytes, and the bytes to insert.
MUTATIONS = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from(["cut off", "overwrite", "insert", "remove", "repeat"]), st.integers(1, 40),
        st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0", b"\n", b"\xff", b" <eos> ", b"\r", b" "]),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def mutate(content, mutations):
    for share, what, count, new in mutations:
        at = int(share * len(content))
        if what == "cut off":
            content = content[:at]
        elif what == "overwrite":
            content = content[:at] + new + content[at + len(new) :]
        elif what == "insert":
            content = content[:at] + new + content[at:]
        elif what == "remove":
            content = content[:at] + content[at + count :]
        else:
            content = content[:at] + content[at : at + 1] * count + content[at:]
    return content


def lines(part, count):
    with (REAL / "ptb" / f"ptb.{part}.txt").open("rb") as file:
        return b"".join(next(file) for _ in range(count))


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(ptb_module, "TORCHTEXT_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("check_md5", [False, True])
@examples(30, 3_000)
def test_penn_treebank(number, check_md5):
    texts = {part: lines(part, 40) for part in ("train", "valid", "test")}

    def read(part, mutations, vocabulary, streams):
        changed = mutate(texts[part], mutations)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in texts.items():
                (Path(folder) / f"ptb.{name}.txt").write_bytes(changed if name == part else text)
            where = {"data_dir": folder, "source": "files"} if check_md5 else {"text": folder}
            data = PTBDataModule(**where, vocabulary=vocabulary, batch_size=streams, unroll=7)
            try:
                data.setup()
            except ValueError as error:
                came_of_it("refused")
                said = str(error)
                assert any(name in said for name in (folder, f"the {part} text", "words of training text"))
                return
            assert not check_md5  # a part of the text is not the published text
            came_of_it("read")
            words = {name: text.decode() for name, text in texts.items()} | {part: changed.decode()}
            for name, text in words.items():
                # All kinds of line ends; the last line may have none.
                *whole, last = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
                expected = [word for line in [*whole, *([last] if last else [])] for word in (*line.split(), "<eos>")]
                assert data.num_tokens[name] == len(expected)
                if name == "valid":
                    inputs, targets = data._valid.inputs.t().flatten(), data._valid.targets.t().flatten()
                    known = [data.vocab[i] for i in inputs[: len(expected) - 1].tolist()]
                    assert all(a in (b, "<unk>") for a, b in zip(known, expected, strict=False))
                    assert int((targets != -100).sum()) == len(expected) - 1
            for batch in (*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()):
                assert batch[0].min() >= 0
                assert batch[0].max() < data.vocab_size

    fuzz(
        number, read, part=st.sampled_from(["train", "valid", "test"]), mutations=MUTATIONS,
        vocabulary=st.sampled_from([None, 2, 30]), streams=st.sampled_from([1, 3, 20]),
    )  # fmt: skip


@examples(40, 3_000)
def test_mnist(number, monkeypatch):
    """The first 60 and 20 images, with matching headers and expectations of the reader."""
    counts = {"train": 60, "t10k": 20}
    contents = {}
    for name, header in mnist_module.HEADERS.items():
        count = counts[name.split("-")[0]]
        with (REAL / "MNIST" / "raw" / name).open("rb") as file:
            real = file.read(len(header) + count * (784 if "images" in name else 1))
        short = header[:4] + count.to_bytes(4, "big") + header[8:]
        contents[name] = short + real[len(header) :]
        monkeypatch.setitem(mnist_module.HEADERS, name, short)
        monkeypatch.setitem(mnist_module.SIZES, name, len(contents[name]))

    def read(name, mutations, in_header):
        if in_header:
            mutations = [(share * 16 / len(contents[name]), *rest) for share, *rest in mutations]
        changed = mutate(contents[name], mutations)
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "MNIST" / "raw"
            raw.mkdir(parents=True)
            for each, content in contents.items():
                (raw / each).write_bytes(changed if each == name else content)
            data = MNISTDataModule(folder, source="files", val_size=10, batch_size=7)
            try:
                data.setup()
            except ValueError as error:
                came_of_it("refused")
                assert f"{raw / name} is damaged" in str(error)
                return
            came_of_it("read" if changed != contents[name] else "not changed")
            assert changed[:8] == contents[name][:8]
            seen = 0
            for images, labels in (*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()):
                assert images.shape == (len(labels), 1, 28, 28)
                assert torch.isfinite(images).all()
                assert labels.min() >= 0
                assert labels.max() <= 9
                seen += len(labels)
            assert seen == 80

    fuzz(number, read, name=st.sampled_from(sorted(contents)), mutations=MUTATIONS, in_header=st.booleans())


def test_a_folder_in_place_of_a_file_is_no_file(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    for name in mnist_module.SIZES:
        (raw / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="MNIST not found"):
        MNISTDataModule(tmp_path, source="files").setup()
    shutil.rmtree(raw)
