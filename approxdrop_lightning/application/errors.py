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

#: Overrides that need an extra of the package: the override, the module it needs, the extra that provides it.
_EXTRAS = (
    ("hydra/launcher=joblib", "hydra_plugins.hydra_joblib_launcher", "sweep"),
    ("logger=wandb", "wandb", "wandb"),
)
#: Steps of a model. Errors raised inside them are bugs, for which the traceback says more than the message.
_STEPS = ("training_step", "validation_step", "test_step")
#: Inductor's message if there is no compiler, and how to fix it.
_NO_COMPILER = "No working C++ compiler"
_HOW_TO_COMPILE = "compile=true needs a C++ compiler: install g++ or clang++, or name one in the variable CXX"


def missing_extra(arguments: Sequence[str]) -> str | None:
    """How to install an extra that the command line needs; None if nothing is missing."""
    for override, module, extra in _EXTRAS:
        if override in [argument.lstrip("+") for argument in arguments] and not _is_there(module):
            return f"{override} needs an extra: pip install 'approxdrop-lightning[{extra}]'"
    return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def one_line(error: BaseException) -> str | None:
    """One-line message for errors that the user can fix without reading code.

    These are values out of range, checkpoints that do not match the model, missing or unwritable files, a loss that
    is NaN or infinite, and a missing compiler with ``compile=true``.

    Returns:
        One line. None for any other error, in the jobs of a sweep (which records the error itself), and with
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
        # "Error in call to target ...", the repr of the original exception, "full_key: model"
        key = re.search(r"full_key: (\S+)", text)
        text = f"{key[1] if key else 'configuration'}: {error.__cause__ or text}"
    if _NO_COMPILER in text:
        text = _HOW_TO_COMPILE
    return f"{' '.join(text.split())} (HYDRA_FULL_ERROR=1 shows where)"


def is_expected(error: BaseException) -> bool:
    """Whether an error is the user's to fix; see :func:`one_line`."""
    if isinstance(error, MisconfigurationException | InstantiationException | FloatingPointError | OSError):
        return True
    if isinstance(error, RuntimeError) and _NO_COMPILER in str(error):
        return True
    in_a_step = any(frame.name in _STEPS for frame in traceback.extract_tb(error.__traceback__))
    return isinstance(error, ValueError) and not in_a_step


def how_to_go_on(folder: Path, baseline: bool = False) -> str:
    """Report what an interrupted run has saved, and the command that resumes it.

    Args:
        folder: The folder of the run.
        baseline: Whether this is the baseline run of a comparison, whose dropout differs from the one configured.
    """
    saved = sorted(folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not saved:
        return f"nothing was saved yet; logs are in {folder}"
    names = ", ".join(f"{path.name}{_step(path)}" for path in saved)
    # A comparison always starts from scratch, so only the interrupted one of its runs is resumed.
    other = ("ckpt_path=", "compare=") + (("dropout=", "dropout.") if baseline else ())
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    given = [override for override in overrides if not override.startswith(other)]
    if baseline:
        given += ["dropout=standard", *(override for override in overrides if override.startswith("dropout.rate="))]
    # The folder rather than a file: resuming picks the checkpoint that continues the run exactly.
    command = shlex.join([*given, f"ckpt_path={_quoted(str(folder))}"])
    return f"checkpoints and logs are in {folder}: {names}. To go on:\n    python train.py {command}"


def _step(path: Path) -> str:
    try:
        step = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    except Exception:  # interrupted while being written, or not one of our checkpoints
        return ""
    return f" (step {step})"


def _quoted(text: str) -> str:
    """Quote a value for Hydra's override grammar."""
    if re.fullmatch(r"[\w./:@%+-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
