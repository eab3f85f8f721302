"""Atomic checkpoints, and a ``ModelCheckpoint`` that keeps its best score when resumed in another folder."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, makes sure that it is on the disk, and only then renames it.

    Whatever stops the process, a checkpoint under its final name is whole. (Lightning writes to the system's
    temporary folder and moves from there: between two file systems that is a copy, which can be cut off half-way,
    and nothing makes the disk have the data before it has the name.) What is loaded must be whole, too, and may hold
    tensors and plain values only. Paths with a protocol (``s3://...``) are left to Lightning.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path`` at once: whoever reads finds all of it or what was there before.

        Raises:
            OSError: It could not be written; what was at ``path`` is still there.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        # By way of memory: torch.save on a file says of a full disk only that it is at an "unexpected pos".
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        # One name for each checkpoint: what a killed process leaves behind is written over, and does not pile up.
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("wb") as file:
                    file.write(buffer.getbuffer())
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)
        except OSError as error:
            raise OSError(error.errno, f"the checkpoint could not be written: {error.strerror}", str(path)) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[[Any, str], Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Load a checkpoint of tensors and plain values.

        Args:
            path: The file.
            map_location: As of ``torch.load``.
            weights_only: False allows any Python object, which may run any code; None is True.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or holds what could run code.
        """
        weights_only = weights_only is not False
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only)
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no checkpoint {path}")
        if not is_whole(path):
            raise ValueError(f"the checkpoint {path} is damaged: it was cut off or altered after it was written")
        try:
            return torch.load(path, map_location=map_location, weights_only=weights_only)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"the checkpoint {path} holds more than tensors and plain values, which could run code: {error}"
            ) from error


class ResumableCheckpoint(ModelCheckpoint):
    """A ``ModelCheckpoint`` that keeps its state when a run is resumed in another folder.

    Lightning's own forgets the best score there, so that the best epoch of the last part would pass for that of the
    run.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best of the run so far, if it is still there; else from none."""
        if all(Path(path).is_file() for path in state_dict["best_k_models"]):
            # Lightning compares folders. It removes no file outside of the new one.
            super().load_state_dict(state_dict | {"dirpath": self.dirpath})


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint is what was written: not cut off, its checksums right.

    ``torch.load`` reads altered weights without a word.

    Raises:
        OSError: The file cannot be opened.
    """
    with Path(path).open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except Exception:  # whatever zipfile stumbles over: damage has many forms
            return False


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def _sync_folder(folder: Path) -> None:
    """Have the disk know the new name; not every system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
