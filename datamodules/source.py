"""Where data comes from: files, a download, the part that is embedded, or a generator, which must be asked for."""

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
DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer
PROBE_TIMEOUT = 4.0  # seconds until ``auto`` takes a machine to be offline
EMBEDDED = Path(__file__).parent / "embedded"


class EmbeddedDataWarning(UserWarning):
    """The whole data set was not to be had; a part of it, or another one, stands in."""


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
    name: str, source: str, find: Callable[[], Path | None], looked_in: str, download: Callable[[], Path], url: str
) -> Path | None:
    """Folder of the whole data set, or None for what is embedded or synthetic.

    Args:
        name: Of the data set, for messages.
        source: ``"files"`` and ``"download"`` must succeed; ``"auto"`` tries both and takes what is embedded
            otherwise, loudly.
        find: Returns the folder of the files, or None. What it raises (a damaged file) is never swallowed.
        looked_in: Where ``find`` looks, for messages.
        download: Fetches the files and returns their folder.
        url: Of the server that ``download`` asks.

    Raises:
        FileNotFoundError: ``source="files"`` and there are none.
        ConnectionError: ``source="download"`` and it failed.
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
    # urllib's errors are OSErrors, but a connection lost halfway is an HTTPException; torchvision adds RuntimeError.
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
    """Raise ``OSError`` if the server of ``url`` does not answer at once.

    Looking a name up heeds no timeout, and each address of each mirror has its own: offline, both add up to minutes.
    So the question is asked in a thread that may be left behind.
    """
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_TIMEOUT):
                outcome.append(None)
        except urllib.error.HTTPError:  # refused, but somebody is there
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
    """A server that does not answer must not hold up the run; the downloaders take no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
