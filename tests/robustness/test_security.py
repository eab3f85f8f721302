"""Untrusted input is only data: it is not executed, written elsewhere, or fetched without being requested."""

import csv
import hashlib
import json
import os
import socket
import struct
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from support.checkpoints import Evil
from support.runs_of_train import QUICK, SMALL, config
from torchvision.datasets import MNIST

from approxdrop_lightning.application.sweep_summary import JOB_FILE, summarise
from datamodules import MNISTDataModule, PTBDataModule
from datamodules import mnist as mnist_module
from datamodules import ptb as ptb_module
from datamodules.source import EmbeddedDataWarning
from train import train

real_data = pytest.mark.skipif("APPROXDROP_DATA" not in os.environ, reason="APPROXDROP_DATA is not set")


@pytest.fixture
def no_network(monkeypatch):
    """Reject and record name lookups and connections."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("the network is blocked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


@pytest.mark.parametrize("model", ["mlp", pytest.param("lstm", marks=pytest.mark.slow)])
@real_data
def test_a_run_needs_no_network(tmp_path, no_network, model):
    train(config(tmp_path, *SMALL[model], *QUICK, "datamodule.source=files"))
    assert no_network == []


@pytest.mark.parametrize("data", [MNISTDataModule, PTBDataModule])
def test_only_a_source_that_may_fetch_fetches(tmp_path, no_network, monkeypatch, data):
    monkeypatch.setattr(ptb_module, "TORCHTEXT_CACHE", tmp_path / "cache")
    with pytest.raises(FileNotFoundError):
        data(tmp_path, source="files").prepare_data()
    data(tmp_path, source="embedded").prepare_data()
    data(tmp_path, source="synthetic").prepare_data()
    assert no_network == []
    with pytest.raises(ConnectionError):
        data(tmp_path, source="download").prepare_data()
    assert no_network
    with pytest.warns(EmbeddedDataWarning):
        data(tmp_path, source="auto").prepare_data()


@real_data
def test_a_checkpoint_that_would_run_code_is_refused_by_train(tmp_path):
    torch.save({"state_dict": {}, "evil": Evil(tmp_path / "made")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="could run code"):
        train(config(tmp_path / "run", *SMALL["mlp"], *QUICK, f"ckpt_path={tmp_path / 'evil.ckpt'}"))
    assert not (tmp_path / "made").exists()


def test_words_are_words(tmp_path):
    """Regardless of what they mean to Python, YAML, a shell or a format string."""
    words = [
        *("__import__('os').mkdir('made')", "${oc.env:HOME}", "{0.__class__}", "%s", "$(touch", "../../x"),
        "!!python/object:os.system",
    ]
    for part in ("train", "valid", "test"):
        (tmp_path / f"ptb.{part}.txt").write_text(" ".join(words) + "\n")
    data = PTBDataModule(text=tmp_path, batch_size=1)
    data.setup()
    assert set(data.vocab) == {*words, "<eos>", "<unk>"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ptb.test.txt", "ptb.train.txt", "ptb.valid.txt"]


def test_the_summary_takes_text_as_text(tmp_path):
    evil = "__import__('os').mkdir('made'); ${oc.env:HOME} $x^{ {0.__class__}"
    record = {
        "job": "0", "status": evil, "dropout": evil, "rate": 0.5, "seed": 0, "overrides": [f"dropout.name={evil}"],
        "model": evil, "metric": "test/acc", "unit": "samples", "data_source": "files", "test": 0.5,
        "per_second": 1.0,
    }  # fmt: skip
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / JOB_FILE).write_text(json.dumps(record))
    summarise(tmp_path)
    with (tmp_path / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["status"] == evil
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "summary.csv", "summary.png"]


def archive(content, name):
    """A gzip file that claims to contain ``name``; Python's own writer would strip the folders."""
    deflate = zlib.compressobj(1, wbits=-15)
    body = deflate.compress(content) + deflate.flush()
    header = b"\x1f\x8b\x08\x08" + bytes(4) + b"\x00\xff" + name.encode() + b"\0"
    return header + body + struct.pack("<2I", zlib.crc32(content), len(content))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror of MNIST on this machine, whose archives name files outside of any folder."""
    served = tmp_path / "mirror"
    served.mkdir()
    resources = []
    for name, header in mnist_module.HEADERS.items():
        packed = archive(header + bytes(mnist_module.SIZES[name] - len(header)), f"../../../{name}-elsewhere")
        (served / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=served)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield served
        server.shutdown()


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path, mirror):
    data = MNISTDataModule(tmp_path / "a" / "b" / "data", source="download")
    data.prepare_data()
    found = [path for path in everything(tmp_path) if not path.startswith("mirror/")]
    raw = [f"a/b/data/MNIST/raw/{name}{suffix}" for name in mnist_module.SIZES for suffix in ("", ".gz")]
    assert found == sorted(raw)


def test_an_archive_of_another_md5_is_not_unpacked(tmp_path, mirror):
    name = "train-images-idx3-ubyte.gz"
    (mirror / name).write_bytes((mirror / name).read_bytes()[:-1] + b"x")
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        MNISTDataModule(tmp_path / "data", source="download").prepare_data()
    assert not (tmp_path / "data" / "MNIST" / "raw" / name[:-3]).exists()
