"""Data sources: files, a download, the embedded data, or, only on request, a generator."""

import http.client
import os
import socket
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = ("auto", "files", "download", "embedded", "synthetic")
DOWNLOAD_TIMEOUT = 10.0  # seconds without a response
PROBE_TIMEOUT = 4.0  # seconds until ``auto`` considers the machine offline
EMBEDDED = Path(__file__).parent / "embedded"


class EmbeddedDataWarning(UserWarning):
    """The whole data set is not available, and the embedded data is used instead."""


def data_folder(data_dir: str | os.PathLike | None) -> Path:
    """``data_dir``, or else the environment variable ``APPROXDROP_DATA``, or else ``data``."""
    return Path(data_dir or os.environ.get("APPROXDROP_DATA") or "data").expanduser()


def check_source(source: str) -> str:
    """Return ``source``; raise ``ValueError`` if it is unknown."""
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    return source


def check_at_least(low: int, **values: int) -> None:
    """Raise ``ValueError`` naming the first value that is not an integer of at least ``low``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def obtain(
    name: str, source: str, find: Callable[[], Path | None], looked_in: str, download: Callable[[], Path], url: str
) -> Path | None:
    """Return the folder of the whole data set, or None for embedded or synthetic data.

    Args:
        name: Name of the data set, for messages.
        source: ``"files"`` and ``"download"`` must succeed; ``"auto"`` tries both and otherwise falls back to the
            embedded data with a warning.
        find: Returns the folder of the files, or None. Its errors, such as a damaged file, always propagate.
        looked_in: The places that ``find`` searches, for messages.
        download: Downloads the files and returns their folder.
        url: URL on the server that ``download`` uses.

    Raises:
        FileNotFoundError: ``source="files"``, but there are no files.
        ConnectionError: ``source="download"``, but the download failed.
    """
    if source in ("embedded", "synthetic"):
        return None
    if (folder := find()) is not None:
        return folder
    if source == "files":
        raise FileNotFoundError(
            f"{name} not found; looked in {looked_in}. Give data_dir (or set APPROXDROP_DATA), or let "
            "source=download fetch it, or take source=embedded"
        )
    try:
        if source == "auto":
            _probe(url)
        with _timeout():
            return download()
    # urllib raises OSErrors, but HTTPException if a connection breaks halfway; torchvision raises RuntimeError.
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        if source == "download":
            raise ConnectionError(f"{name} could not be downloaded: {error}") from error
        warnings.warn(
            f"{name}: no files in {looked_in}, and the download failed ({error}). What is embedded is used instead, "
            "which is smaller: results are not those on the whole data set",
            EmbeddedDataWarning,
            stacklevel=3,
        )
        return None


def _probe(url: str) -> None:
    """Raise ``OSError`` if the server of ``url`` does not respond promptly.

    Name resolution ignores timeouts, and each address of each mirror has its own; offline, these add up to minutes.
    The request therefore runs in a thread that can be abandoned.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_TIMEOUT):
                outcome.append(None)
        except urllib.error.HTTPError:  # an error response, but the server is reachable
            outcome.append(None)
        except (OSError, http.client.HTTPException) as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT)
    if not outcome:
        raise TimeoutError(f"no answer from {url} within {PROBE_TIMEOUT:g} seconds")
    if outcome[0] is not None:
        raise OSError(str(outcome[0]))


@contextmanager
def _timeout() -> Iterator[None]:
    """Set a default socket timeout, so that an unresponsive server cannot block downloaders, which accept none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
