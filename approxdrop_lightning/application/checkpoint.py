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
    """Writes each checkpoint to a temporary file in the same folder, syncs it to disk, then renames it.

    A file under its final name is therefore always complete, however the process ends. (Lightning moves the file from
    the system's temporary folder. Across file systems that is a copy, which can be interrupted, and nothing syncs the
    data to disk before the rename.) Loading verifies the checksums and accepts only tensors and plain values. Paths
    with a protocol (``s3://...``) are left to Lightning.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], accelerator="cpu", logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path`` atomically: readers see either the old file or the complete new one.

        Raises:
            OSError: The checkpoint could not be written; the file previously at ``path`` is unchanged.
        """
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        # Serialised in memory first: on a full disk torch.save to a file only complains of an "unexpected pos".
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        # A fixed name per checkpoint: leftovers of killed processes are overwritten instead of piling up.
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
            path: The checkpoint file.
            map_location: See ``torch.load``.
            weights_only: If False, unpickle arbitrary objects, which can execute arbitrary code. None means True.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or contains objects that could execute code.
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

    Lightning's own class resets the best score in that case, so the best epoch since the resume would be reported as
    the best of the whole run.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best checkpoints so far if their files still exist; otherwise start without any."""
        if all(Path(path).is_file() for path in state_dict["best_k_models"]):
            # Lightning discards the state if the folder differs. It never deletes files outside the new folder.
            super().load_state_dict(state_dict | {"dirpath": self.dirpath})


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint is intact: not truncated, with correct checksums.

    ``torch.load`` does not notice corrupted weights.

    Raises:
        OSError: The file cannot be opened.
    """
    with Path(path).open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return archive.testzip() is None
        except Exception:  # zipfile raises all kinds of errors on damaged archives
            return False


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def _sync_folder(folder: Path) -> None:
    """Sync the rename to disk, on systems that let a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
