"""One-line messages for runs that end early: what happened, what was saved, how to resume."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException

#: What needs an extra of the package: the override, the module that it brings, the extra.
_EXTRAS = (
    ("hydra/launcher=joblib", "hydra_plugins.hydra_joblib_launcher", "sweep"),
    ("logger=wandb", "wandb", "wandb"),
)
#: Steps of a model. What is raised in one is a matter of the program, and its place tells more than its message.
_STEPS = ("training_step", "validation_step", "test_step")
#: What inductor says where it has nothing to compile with, and what to do about it.
_NO_COMPILER = "No working C++ compiler"
_HOW_TO_COMPILE = "compile=true needs a C++ compiler: install g++ or clang++, or name one in the variable CXX"


def missing_extra(arguments: Sequence[str]) -> str | None:
    """What to install for an option of the command line; None if nothing is missing."""
    for override, module, extra in _EXTRAS:
        if override in [argument.lstrip("+") for argument in arguments] and not _is_there(module):
            return f"{override} needs an extra: pip install 'approxdrop-lightning[{extra}]'"
    return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it is a part of
        return False


def one_line(error: BaseException) -> str | None:
    """The message of an error that somebody who starts a run can mend without reading code.

    That is a value outside of what is allowed, a checkpoint that does not fit, a file that is not there or not
    writable, a loss that is no number, a compiler that ``compile=true`` lacks.

    Returns:
        One line, or None: for any other error, for the job of a sweep (which records it), and with
        ``HYDRA_FULL_ERROR=1``.
    """
    if os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"):
        return None
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return None
    if not is_expected(error):
        return None
    text = str(error)
    if isinstance(error, InstantiationException):
        # "Error in call to target ...", the repr of what was raised there, "full_key: model"
        key = re.search(r"full_key: (\S+)", text)
        text = f"{key[1] if key else 'configuration'}: {error.__cause__ or text}"
    if _NO_COMPILER in text:
        text = _HOW_TO_COMPILE
    return f"{' '.join(text.split())} (HYDRA_FULL_ERROR=1 shows where)"


def is_expected(error: BaseException) -> bool:
    """Whether an error is the user's to mend: see :func:`one_line`."""
    if isinstance(error, MisconfigurationException | InstantiationException | FloatingPointError | OSError):
        return True
    if isinstance(error, RuntimeError) and _NO_COMPILER in str(error):
        return True
    in_a_step = any(frame.name in _STEPS for frame in traceback.extract_tb(error.__traceback__))
    return isinstance(error, ValueError) and not in_a_step


def how_to_go_on(folder: Path, baseline: bool = False) -> str:
    """What a run that was stopped has saved, and the command that goes on from there.

    Args:
        folder: The folder of the run.
        baseline: Whether it is the conventional half of a comparison, which has another dropout than was asked for.
    """
    saved = sorted(folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not saved:
        return f"nothing was saved yet; logs are in {folder}"
    names = ", ".join(f"{path.name}{_step(path)}" for path in saved)
    # A comparison begins anew, so it is one of its runs that goes on.
    other = ("ckpt_path=", "compare=") + (("dropout=", "dropout.") if baseline else ())
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    given = [override for override in overrides if not override.startswith(other)]
    if baseline:
        given += ["dropout=standard", *(override for override in overrides if override.startswith("dropout.rate="))]
    # The folder: of the checkpoints in it that one is taken that goes on exactly.
    command = shlex.join([*given, f"ckpt_path={_quoted(str(folder))}"])
    return f"checkpoints and logs are in {folder}: {names}. To go on:\n    python train.py {command}"


def _step(path: Path) -> str:
    try:
        step = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    except Exception:  # being written as the stop came, or of somebody else's making
        return ""
    return f" (step {step})"


def _quoted(text: str) -> str:
    """A value as Hydra's grammar takes it."""
    if re.fullmatch(r"[\w./:@%+-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
