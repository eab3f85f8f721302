"""Loads the C sources beside it, compiled once with the compiler of the machine; without one, PyTorch serves.

``APPROXDROP_NATIVE=0`` turns it off. The library is kept in the user's cache folder, under a name that stands for the
source, the compiler, the processor, and the content: a file that was damaged is compiled anew. Without such a folder,
or the right to write to it, one for temporary files serves.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from approxdrop_lightning.patterns.units import UnitsStruct

_SOURCES = [Path(__file__).with_name(name) for name in ("copies.c", "product.c", "recurrence.c", "one_pass.c")]
_HEADERS = [Path(__file__).with_name(name) for name in ("kernels.h", "tile.h")]
# Not -ffast-math: linking with it would change the rounding of tiny numbers for the whole process.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-std=gnu11")
_LONGEST_COMPILATION = 120.0  # seconds
_PARTIAL = "partial-"  # how the names of files begin that are being written
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


_COPY = [_POINTER, _SIZE, _POINTER, _SIZE, UnitsStruct, UnitsStruct, _SIZE, _SIZE, _INT]
_SIGNATURES = {
    "take": _COPY,
    "put": [*_COPY, _INT],
    "zero": [_POINTER, _SIZE, UnitsStruct, UnitsStruct, _SIZE, _SIZE, _INT, _INT],
    "column_sums": [_POINTER, _POINTER, _SIZE, _POINTER, _INT],
    "products": [_POINTER, _SIZE, _INT],
    "one_pass_product": [_POINTER, _INT],
    "one_pass_input_grad": [_POINTER, _INT],
    "one_pass_weight_grad": [_POINTER, _INT],
    "lstm_forward": [*[_POINTER] * 7, *[_SIZE] * 4, _INT],
    "lstm_backward": [*[_POINTER] * 9, *[_SIZE] * 4, _INT],
}
#: Functions that return whether memory was lacking.
_ALLOCATING = tuple(name for name in _SIGNATURES if name.startswith(("products", "one_pass", "lstm")))


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there is no compiler, or it is turned off. Never raises."""
    if os.environ.get("APPROXDROP_NATIVE", "1") == "0":
        return None
    try:
        return _obtain()
    except Exception as error:  # a training goes on without them, whatever is wrong with the machine
        logging.getLogger(__name__).warning(
            "the kernels of approxdrop_lightning were not compiled; without them skipping may take longer than "
            "it saves: %s",
            error,
        )
        return None


def _check_memory(lacking: int, function: Any, arguments: Any) -> None:
    if lacking:
        raise MemoryError(f"{function.__name__}: no memory for its work space")


class _CompilerError(Exception):
    """The compiler is not there or does not run; another folder would not help."""


def _obtain() -> ctypes.CDLL:
    """The library from the user's cache, or from a folder for temporary files where that cannot be used."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise _CompilerError("no C compiler was found")
    key = _key(compiler)
    reasons = []
    with contextlib.ExitStack() as stack:
        for folder in (_cache_folder, _temporary_folder, lambda: _private_folder(stack)):
            try:
                return _from(folder(), key, compiler)
            except (OSError, RuntimeError) as error:  # the latter: Path.home() of a user that has none
                reasons.append(str(error))
    raise OSError("; ".join(dict.fromkeys(reasons)))


def _key(compiler: str) -> str:
    """What a compiled library depends on."""
    texts = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    texts += [text.encode() for text in (repr(_FLAGS), compiler, _processor())]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _from(folder: Path, key: str, compiler: str) -> ctypes.CDLL:
    """The library of a folder, compiled into it if it is not there whole.

    The name has the digest of the content. A file that was cut short must not be loaded: its missing pages end the
    process (SIGBUS) when they are called.

    Raises:
        OSError: The library cannot be written to the folder, or not loaded from it.
        _CompilerError: The compiler does not run.
    """
    for path in sorted(folder.glob(f"kernels-{key}-*.so")):
        whole = False
        with contextlib.suppress(OSError):  # no right to read it, or somebody else removed it
            whole = path.name == _name(key, path.read_bytes())
            if not whole:
                path.unlink()
        if whole:
            return _load(path)
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, prefix=_PARTIAL, suffix=".so")
    os.close(handle)
    try:
        _remove_stale(folder)
        _run(compiler, partial)
        # Readable by whoever may enter the folder: a cache may be shared, and mkstemp is for its user alone.
        os.chmod(partial, 0o644)
        path = folder / _name(key, Path(partial).read_bytes())
        os.replace(partial, path)  # at once, so that no other process sees half of it
    finally:
        Path(partial).unlink(missing_ok=True)
    return _load(path)


def _name(key: str, content: bytes) -> str:
    return f"kernels-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _remove_stale(folder: Path) -> None:
    """Remove what compilations have left that were killed."""
    for path in folder.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LONGEST_COMPILATION * 2:
                path.unlink()


def _load(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions."""
    loaded = ctypes.CDLL(str(path))
    for name, signature in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = signature, None
        if name in _ALLOCATING:
            function.restype, function.errcheck = _INT, _check_memory
    return loaded


def _run(compiler: str, out: str) -> None:
    """Compile with threads if the compiler has them.

    Raises:
        OSError: It fails, be it for want of space.
        _CompilerError: It does not run, or takes too long.
    """
    for threads in (["-fopenmp"], []):
        command = [compiler, *_FLAGS, *threads, *map(str, _SOURCES), "-o", out, "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_LONGEST_COMPILATION, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            raise _CompilerError(f"{compiler} does not run: {error}") from error
        if done.returncode == 0:
            return
    message = done.stderr.decode(errors="replace").strip()  # in whatever encoding the compiler's language has
    raise OSError(f"{' '.join(command)} failed: {message[-500:]}")


def _processor() -> str:
    """What ``-march=native`` depends on, so that a cache on a shared disk serves each kind of machine its own."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "approxdrop_lightning"


def _temporary_folder() -> Path:
    """A folder of this user below that for temporary files.

    Raises:
        OSError: Somebody else has made it, or may write to it: what lies there must not be run.
    """
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"approxdrop_lightning-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise OSError(f"{folder} is not this user's alone")
    return folder


def _private_folder(stack: contextlib.ExitStack) -> Path:
    """A folder of this process, which is gone as soon as the library is loaded."""
    return Path(
        stack.enter_context(tempfile.TemporaryDirectory(prefix="approxdrop_lightning-", ignore_cleanup_errors=True))
    )
