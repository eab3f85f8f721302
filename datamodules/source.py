"""Where data comes from: files, a download, or the embedded stand-in; never silently from the latter."""

import http.client
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = ("auto", "files", "download", "synthetic")
DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer


class SyntheticDataWarning(UserWarning):
    """Real data was not to be had; the numbers that follow say little."""


def data_folder(data_dir: str | os.PathLike | None) -> Path:
    """``data_dir``, or the environment's ``APPROXDROP_DATA``, or ``data``."""
    return Path(data_dir or os.environ.get("APPROXDROP_DATA") or "data").expanduser()


def check_source(source: str) -> str:
    """Return ``source``; raise ``ValueError`` if there is none of that name."""
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    return source


def check_at_least(low: int, **values: int) -> None:
    """Raise ``ValueError`` naming the first value that is no whole number of at least ``low``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def obtain(
    name: str, source: str, find: Callable[[], Path | None], looked_in: str, download: Callable[[], Path]
) -> Path | None:
    """Folder of the real data, or None for the stand-in.

    Args:
        name: Of the data set, for messages.
        source: ``"files"`` and ``"download"`` must succeed; ``"auto"`` tries both and falls back, loudly.
        find: Returns the folder of the files, or None. What it raises (a damaged file) is never swallowed.
        looked_in: Where ``find`` looks, for messages.
        download: Fetches the files and returns their folder.

    Raises:
        FileNotFoundError: ``source="files"`` and there are none.
        ConnectionError: ``source="download"`` and it failed.
    """
    if source == "synthetic":
        return None
    if (folder := find()) is not None:
        return folder
    if source == "files":
        raise FileNotFoundError(
            f"{name} not found; looked in {looked_in}. Give data_dir (or set APPROXDROP_DATA), or let "
            "source=download fetch it, or source=synthetic replace it"
        )
    try:
        with _timeout():
            return download()
    # urllib's errors are OSErrors, but a connection lost halfway is an HTTPException; torchvision adds RuntimeError.
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        if source == "download":
            raise ConnectionError(f"{name} could not be downloaded: {error}") from error
        warnings.warn(
            f"{name}: no files in {looked_in}, and the download failed ({error}). SYNTHETIC DATA is used instead: "
            "results are not results on real data",
            SyntheticDataWarning,
            stacklevel=3,
        )
        return None


@contextmanager
def _timeout() -> Iterator[None]:
    """A server that does not answer must not hold up the run; the downloaders take no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
