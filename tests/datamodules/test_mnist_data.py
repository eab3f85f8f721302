"""MNIST: correct images, cheap batches, damaged files rejected, no silent fallback."""

import importlib.util
import os
import threading
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT
from torchvision.datasets import MNIST

from datamodules import MNISTDataModule
from datamodules import mnist as mnist_module
from datamodules import source as source_module
from datamodules.source import EMBEDDED, EmbeddedDataWarning

DATA = Path(os.environ.get("APPROXDROP_DATA", "/nonexistent"))
real_data = pytest.mark.skipif(not (DATA / "MNIST").is_dir(), reason="APPROXDROP_DATA names no folder with MNIST/")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("APPROXDROP_DATA", raising=False)


def images_and_labels(loader):
    return (torch.cat(part) for part in zip(*loader, strict=True))


@real_data
def test_real_images_normalised_and_split_once():
    data = MNISTDataModule(DATA, source="files")
    data.prepare_data()
    data.setup()
    assert data.data_source.startswith("files")
    images, labels = images_and_labels(data.test_dataloader())
    stock = MNIST(str(DATA), train=False)
    assert torch.equal(labels, stock.targets)
    restored = (images * 0.3081 + 0.1307) * 255
    assert (restored.squeeze(1) - stock.data).abs().max() < 1e-3
    train, _ = images_and_labels(data.train_dataloader())
    val, _ = images_and_labels(data.val_dataloader())
    assert (len(train), len(val), len(images)) == (55_000, 5_000, 10_000)
    assert abs(train.mean()) < 0.01
    assert abs(train.std() - 1) < 0.01
    both = torch.cat([train, val]).sum((1, 2, 3)).sort().values
    whole = mnist_module.normalise(MNIST(str(DATA)).data).sum((1, 2, 3)).sort().values
    torch.testing.assert_close(both, whole, rtol=1e-4, atol=1e-2)


@real_data
def test_order_is_new_each_epoch_and_follows_the_global_seed():
    data = MNISTDataModule(DATA, train_limit=300, batch_size=64)
    data.setup()
    epochs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loader = data.train_dataloader()
        orders = []
        for epoch in range(2):
            loader.batch_sampler.sampler.set_epoch(epoch)  # as in Lightning
            orders.append(torch.cat([y for _, y in loader]))
        epochs.append(orders)
    assert torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(epochs[0][1], epochs[1][1])
    assert not torch.equal(epochs[0][0], epochs[0][1])
    assert not torch.equal(epochs[0][0], epochs[2][0])
    assert [len(y) for _, y in data.train_dataloader()] == [64, 64, 64, 64, 44]


@real_data
@pytest.mark.parametrize("source", ["files", "auto"])
def test_a_truncated_file_is_named_and_never_replaced(tmp_path, source):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (DATA / "MNIST" / "raw").iterdir():
        if file.name in mnist_module.SIZES:
            (raw / file.name).symlink_to(file)
    labels = raw / "train-labels-idx1-ubyte"
    content = labels.read_bytes()[:1000]
    labels.unlink()
    labels.write_bytes(content)
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is damaged: 60,008 bytes expected, 1,000 found"):
        MNISTDataModule(tmp_path, source=source).prepare_data()


# Zeros, as left by a crash; a type unknown to torchvision; a valid header with impossible labels.
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(60_008), "header 000008010000ea60 expected, 0000000000000000 found"),
        (b"\0\0\x0a\x01\0\0\xea\x60" + bytes(60_000), "header 000008010000ea60 expected, 00000a010000ea60 found"),
        (b"\0\0\x08\x01\0\0\xea\x60" + b"\xff" * 60_000, "labels from 0 to 9 expected, 255 found"),
    ],
)
def test_garbage_of_the_right_size_is_refused(tmp_path, content, message):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, size in mnist_module.SIZES.items():
        header = mnist_module.HEADERS[name]
        (raw / name).write_bytes(header + bytes(size - len(header)))
    (raw / "train-labels-idx1-ubyte").write_bytes(content)
    data = MNISTDataModule(tmp_path, source="files")
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte is damaged: {message}"):
        data.setup()


def test_no_files_is_said_with_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"looked in {tmp_path}/MNIST/raw"):
        MNISTDataModule(tmp_path, source="files").prepare_data()


def test_the_fall_back_is_loud_and_a_demanded_download_fails(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(mnist_module.MNIST, "download", refuse)
    monkeypatch.setattr(source_module, "_probe", lambda url: None)
    data = MNISTDataModule(tmp_path)
    with pytest.warns(EmbeddedDataWarning, match=r"Error downloading.*What is embedded is used instead"):
        data.prepare_data()
    data.setup()
    assert (data.data_kind, data.data_source) == ("embedded", "MNIST, a part (5,000 images, embedded)")
    with pytest.raises(ConnectionError, match="Error downloading"):
        MNISTDataModule(tmp_path, source="download").prepare_data()


def test_the_embedded_part_is_balanced_and_apart():
    data = MNISTDataModule(source="embedded")
    data.setup()
    parts = [data._train, data._val, data._test]
    assert [torch.bincount(labels).tolist() for _, labels in parts] == [[500] * 10, [50] * 10, [50] * 10]
    images = torch.cat([images for images, _ in parts]).flatten(1)
    assert len(images.unique(dim=0)) == 6000
    assert abs(images.mean()) < 0.02 and abs(images.std() - 1) < 0.02
    larger = MNISTDataModule(source="embedded", val_size=1000)
    larger.setup()
    assert len(larger._val[0]) == 1000
    assert larger.data_source == "MNIST, a part (4,500 images, embedded)"


@real_data
def test_the_embedded_part_is_what_its_script_makes_of_the_real_data():
    spec = importlib.util.spec_from_file_location("make", ROOT / "datamodules/embedded/make_mnist_part.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with np.load(EMBEDDED / "mnist_part.npz") as arrays:
        for name, made in script.make(str(DATA)).items():
            assert np.array_equal(arrays[name], made), name


def test_embedded_files_are_small_and_have_a_note():
    files = [path for path in EMBEDDED.iterdir() if path.suffix in (".npz", ".bz2")]
    assert len(files) == 4
    note = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    assert all(path.stat().st_size < 1_000_000 for path in files)
    assert "Attribution-Share Alike 3.0" in note and "public domain" in note and "mnist_part.npz" in note


def test_offline_auto_does_not_wait_for_names_to_be_looked_up(tmp_path, monkeypatch):
    """As behind a resolver that drops requests; the requesting thread is abandoned."""
    asked, answer = threading.Event(), threading.Event()

    def hang(*_, **__):
        asked.set()
        answer.wait(20)
        raise OSError("too late")

    monkeypatch.setattr(source_module, "PROBE_TIMEOUT", 0.2)
    monkeypatch.setattr(source_module.urllib.request, "urlopen", hang)
    monkeypatch.setattr(mnist_module.MNIST, "download", lambda self: pytest.fail("tried to download"))
    began = time.monotonic()
    with pytest.warns(EmbeddedDataWarning, match=r"no answer from http.* within 0.2 seconds"):
        MNISTDataModule(tmp_path).prepare_data()
    answer.set()
    assert asked.is_set()
    assert time.monotonic() - began < 5


def test_a_server_that_refuses_the_question_is_there(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.HTTPError("http://x", 403, "forbidden", {}, None)

    monkeypatch.setattr(source_module.urllib.request, "urlopen", refuse)
    source_module._probe("http://x")


def test_synthetic_digits_are_reproducible_private_and_learnable():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    modules = [MNISTDataModule(source="synthetic", val_size=1000, seed=4) for _ in range(2)]
    for data in modules:
        data.setup()
    assert torch.equal(torch.get_rng_state(), before)
    (x, y), (other, _) = (data._train for data in modules)
    assert torch.equal(x, other)
    assert x.shape == (11_000, 1, 28, 28)
    assert torch.bincount(y, minlength=10).min() > 900
    # Class means distinguish some digits, but by far not all: the data is neither noise nor trivial.
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    test, labels = modules[0]._test
    right = (torch.cdist(test.flatten(1), means.flatten(1)).argmin(1) == labels).float().mean()
    assert 0.2 < right < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "web"}, "source must be one of auto, files, download, embedded, synthetic, got 'web'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"val_size": 0}, "val_size must be"),
        ({"num_workers": -1}, "num_workers must be a whole number of at least 0, got -1"),
        ({"train_limit": 0}, "train_limit must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MNISTDataModule(**arguments)


def test_a_validation_set_as_large_as_the_data_is_refused():
    with pytest.raises(ValueError, match="val_size must be below the 12,000 training images, got 12,000"):
        MNISTDataModule(source="synthetic", val_size=12_000).setup()
