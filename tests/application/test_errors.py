"""Messages of runs that end early."""

import shlex

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from approxdrop_lightning.application import errors
from approxdrop_lightning.application.models import MLPClassifier


def caught(raise_):
    try:
        raise_()
    except BaseException as error:
        return error


def training_step():
    raise ValueError("of the model's own")


def out_of_range():
    raise ValueError("batch_size must be a whole number\nof at least 1, got 0")


def wrong_rate():
    target = f"{MLPClassifier.__module__}.{MLPClassifier.__qualname__}"
    instantiate({"model": {"_target_": target, "rate": "abc"}})


def test_what_the_user_can_mend_is_one_line():
    assert errors.one_line(MisconfigurationException("rates differ")).startswith("rates differ (HYDRA_FULL_ERROR=1")
    line = errors.one_line(caught(out_of_range))
    assert line.startswith("batch_size must be a whole number of at least 1, got 0 (")
    error = caught(wrong_rate)
    assert isinstance(error, InstantiationException)
    line = errors.one_line(error)
    assert line.startswith("model: rate=abc is neither a number in [0, 1) nor a list of them (")
    assert "\n" not in line


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    error = caught(lambda: torch.compile(torch.nn.ReLU())(torch.ones(3)))
    assert errors.one_line(error).startswith("compile=true needs a C++ compiler: install g++ or clang++, or name one")


def test_anything_else_keeps_its_traceback(monkeypatch):
    for error in (RuntimeError("x"), KeyError("x"), caught(training_step)):
        assert errors.one_line(error) is None
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert errors.one_line(caught(out_of_range)) is None


@pytest.mark.parametrize(
    ("override", "extra"),
    [("hydra/launcher=joblib", "sweep"), ("+hydra/launcher=joblib", "sweep"), ("logger=wandb", "wandb")],
)
def test_an_extra_that_is_missing_is_named(override, extra, monkeypatch):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    message = errors.missing_extra(["-m", "seed=1,2", override])
    assert message == f"{override.lstrip('+')} needs an extra: pip install 'approxdrop-lightning[{extra}]'"
    assert errors.missing_extra(["-m", "seed=1,2", "hydra/launcher=basic"]) is None
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: object())
    assert errors.missing_extra([override]) is None


def test_how_to_go_on_names_what_was_saved_and_a_command_that_can_be_copied(tmp_path):
    folder = tmp_path / "a run, [1]"
    assert errors.how_to_go_on(folder) == f"nothing was saved yet; logs are in {folder}"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"global_step": 43}, folder / "checkpoints" / "last.ckpt")
    (folder / "checkpoints" / "interrupted.ckpt").write_bytes(b"half")
    message = errors.how_to_go_on(folder)
    assert "last.ckpt (step 43)" in message and "interrupted.ckpt." in message
    command = shlex.split(message.splitlines()[-1])
    assert command[:2] == ["python", "train.py"]
    from hydra import compose, initialize_config_dir
    from support import ROOT

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", command[2:])
    assert cfg.ckpt_path == str(folder)
