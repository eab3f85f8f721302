"""Checkpoints: written atomically, rejected if damaged or able to run code, and resumed with their best score."""

import contextlib
import errno
import os
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.checkpoints import Evil, small_disk
from support.fuzz import examples, fuzz

from approxdrop_lightning.application.checkpoint import AtomicCheckpointIO, ResumableCheckpoint, is_whole
from approxdrop_lightning.application.models import MLPClassifier

IO = AtomicCheckpointIO()
SMALL, LARGE = {"weight": torch.arange(100.0)}, {"weight": torch.arange(500_000.0)}


@contextlib.contextmanager
def file_size_limit(size):
    """Limit the file size of this process, which acts like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def loads(path):
    return torch.load(path, weights_only=True)["weight"].numel()


def test_what_is_written_is_read():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "x.ckpt"
        IO.save_checkpoint(SMALL, path)
        assert torch.equal(IO.load_checkpoint(path)["weight"], SMALL["weight"])
        assert [p.name for p in path.parent.iterdir()] == ["x.ckpt"]


def full_disk(tmp_path):
    return small_disk(tmp_path / "disk", "size=1m")


def limit(tmp_path):
    (tmp_path / "disk").mkdir()
    return file_size_limit(1_000_000)


@pytest.mark.parametrize(
    ("disk", "reason"), [(full_disk, errno.ENOSPC), (limit, errno.EFBIG)], ids=["full disk", "file size limit"]
)
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, disk, reason):
    path = tmp_path / "disk" / "last.ckpt"
    with disk(tmp_path):
        IO.save_checkpoint(SMALL, path)
        with pytest.raises(OSError, match=f"could not be written: {os.strerror(reason)}: '{path}'"):
            IO.save_checkpoint(LARGE, path)
        assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
        assert loads(path) == 100


def test_a_read_only_file_system_is_named(tmp_path):
    with small_disk(tmp_path / "disk", "ro,size=1m") as disk, pytest.raises(OSError, match="Read-only file system"):
        IO.save_checkpoint(SMALL, disk / "last.ckpt")


def test_a_folder_without_the_right_to_write_is_named():
    """Root may write everywhere, so this runs as another user."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(PermissionError, match=r"could not be written: Permission denied: '.*last.ckpt'"):
                IO.save_checkpoint(SMALL, Path(name) / "last.ckpt")
        finally:
            if root:
                os.seteuid(0)
            Path(name).chmod(0o755)
        assert not list(Path(name).iterdir())


def test_what_a_killed_process_left_behind_is_written_over(tmp_path):
    (tmp_path / "last.ckpt.tmp").write_bytes(b"half of a checkpoint")
    IO.save_checkpoint(SMALL, tmp_path / "last.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert loads(tmp_path / "last.ckpt") == 100


def whole_bytes():
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"weight": torch.arange(64.0), "name": "x"}, Path(folder) / "x.ckpt")
        return (Path(folder) / "x.ckpt").read_bytes()


@examples(100, 5_000)
def test_a_damaged_checkpoint_is_never_read(number):
    """Truncated anywhere it is rejected; with any byte altered it is rejected or loads the same values."""
    content = whole_bytes()

    def damaged(position, change, cut):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.ckpt"
            if cut:
                path.write_bytes(content[:position])
                assert not is_whole(path)
            else:
                path.write_bytes(content[:position] + bytes([content[position] ^ change]) + content[position + 1 :])
            try:
                loaded = IO.load_checkpoint(path)
            except (ValueError, RuntimeError) as error:
                assert str(error)
            else:
                assert not cut
                assert loaded["name"] == "x"
                assert torch.equal(loaded["weight"], torch.arange(64.0))

    fuzz(
        number, damaged,
        position=st.integers(0, len(content) - 1), change=st.integers(1, 255), cut=st.booleans(),
    )  # fmt: skip


@pytest.mark.parametrize("weights_only", [None, True])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, weights_only):
    torch.save({"state_dict": {}, "evil": Evil(tmp_path / "made")}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="more than tensors and plain values, which could run code"):
        IO.load_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    assert not (tmp_path / "made").exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt"):
        IO.load_checkpoint(tmp_path / "nowhere.ckpt")


def test_the_best_score_goes_along_into_another_folder(tmp_path):
    """Lightning's own callback forgets it in that case."""
    states = {}
    for cls in (ModelCheckpoint, ResumableCheckpoint):
        first = cls(tmp_path / "first", monitor="x", mode="max")
        path = str(tmp_path / "first" / "best.ckpt")
        Path(path).parent.mkdir(exist_ok=True)
        torch.save({}, path)
        first.best_model_path = first.kth_best_model_path = path
        first.best_model_score = first.kth_value = torch.tensor(0.9)
        first.best_k_models = {path: torch.tensor(0.9)}
        second = cls(tmp_path / "second", monitor="x", mode="max")
        if cls is ModelCheckpoint:
            with pytest.warns(UserWarning, match="dirpath has changed"):
                second.load_state_dict(first.state_dict())
        else:
            second.load_state_dict(first.state_dict())
        states[cls] = second
    assert states[ModelCheckpoint].best_model_score is None
    again = states[ResumableCheckpoint]
    assert (again.best_model_score, again.best_model_path) == (torch.tensor(0.9), path)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(MLPClassifier(in_features=4, hidden=(4,)))
    assert not again.check_monitor_top_k(trainer, torch.tensor(0.8))
    assert again.check_monitor_top_k(trainer, torch.tensor(0.95))
    assert not again._should_remove_checkpoint(trainer, path, str(tmp_path / "second" / "best.ckpt"))


def test_a_best_checkpoint_that_is_gone_is_forgotten(tmp_path):
    first = ResumableCheckpoint(tmp_path / "first", monitor="x", mode="max")
    first.best_model_path = str(tmp_path / "first" / "gone.ckpt")
    first.best_model_score, first.best_k_models = torch.tensor(0.9), {first.best_model_path: torch.tensor(0.9)}
    second = ResumableCheckpoint(tmp_path / "second", monitor="x", mode="max")
    second.load_state_dict(first.state_dict())
    assert (second.best_model_path, second.best_model_score) == ("", None)
