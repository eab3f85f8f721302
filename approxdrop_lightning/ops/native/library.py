"""Compiles the C sources in this folder on first use and loads them; without a compiler, PyTorch is used instead.

``APPROXDROP_NATIVE=0`` disables the compiled code. The library is stored in the user's cache folder, under a name
derived from the source, the compiler, the processor and the library's content, so that damaged files are recompiled.
If that folder is missing or read-only, a folder for temporary files takes its place.
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

_SOURCES = [
    Path(__file__).with_name(name) for name in ("copies.c", "product.c", "recurrence.c", "one_pass.c", "grouped.c")
]
_HEADERS = [Path(__file__).with_name(name) for name in ("kernels.h", "product.h", "tile.h")]
# No -ffast-math: linking with it would flush denormals to zero in the whole process.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-std=gnu11")
_LONGEST_COMPILATION = 120.0  # seconds
_PARTIAL = "partial-"  # prefix of files that are still being written
_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


_COPY = [_POINTER, _SIZE, _POINTER, _SIZE, UnitsStruct, UnitsStruct, _SIZE, _SIZE, _INT]
_MATRIX = [_POINTER, _SIZE, _SIZE]  # and its strides
_SIGNATURES = {
    "take": _COPY,
    "put": [*_COPY, _INT],
    "zero": [_POINTER, _SIZE, UnitsStruct, UnitsStruct, _SIZE, _SIZE, _INT, _INT],
    "products": [_POINTER, _SIZE, _INT],
    "grouped_product": [_POINTER, *_MATRIX, *_MATRIX, _POINTER, _POINTER, ctypes.c_double, _INT, _INT],
    "grouped_input_grad": [_POINTER, *_MATRIX, *_MATRIX, _POINTER, _INT],
    "grouped_weight_grad": [_POINTER, *_MATRIX, *_MATRIX, _POINTER, _INT],
    "grouped_bias_grad": [_POINTER, _POINTER, _POINTER, _INT],
    "grouped_gradients": [
        _POINTER,
        *_MATRIX,
        _POINTER,
        _POINTER,
        _SIZE,
        ctypes.c_double,
        *_MATRIX,
        *_MATRIX,
        *[_POINTER] * 3,
        _INT,
    ],
    "one_pass_product": [_POINTER, _INT],
    "one_pass_weight_grad": [_POINTER, _INT, _INT],
    "lstm_forward": [*[_POINTER] * 7, *[_SIZE] * 4, _INT],
    "lstm_backward": [*[_POINTER] * 9, *[_SIZE] * 4, _INT],
}
#: Functions that return nonzero if they ran out of memory.
_ALLOCATING = tuple(name for name in _SIGNATURES if name.startswith(("products", "grouped", "one_pass", "lstm")))


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if there is no compiler or compiled code is disabled. Never raises."""
    if os.environ.get("APPROXDROP_NATIVE", "1") == "0":
        return None
    try:
        return _obtain()
    except Exception as error:  # training must go on without them, whatever is wrong with the machine
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
    """The compiler is missing or does not run, so trying another folder would not help."""


def _obtain() -> ctypes.CDLL:
    """The library from the user's cache folder, or from a temporary folder if that is unusable."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise _CompilerError("no C compiler was found")
    key = _key(compiler)
    reasons = []
    with contextlib.ExitStack() as stack:
        for folder in (_cache_folder, _temporary_folder, lambda: _private_folder(stack)):
            try:
                return _from(folder(), key, compiler)
            except (OSError, RuntimeError) as error:  # RuntimeError: Path.home() of a user without one
                reasons.append(str(error))
    raise OSError("; ".join(dict.fromkeys(reasons)))


def _key(compiler: str) -> str:
    """Digest of everything that a compiled library depends on."""
    texts = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    texts += [text.encode() for text in (repr(_FLAGS), compiler, _processor())]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _from(folder: Path, key: str, compiler: str) -> ctypes.CDLL:
    """Load the library from a folder, compiling it first if there is no intact copy.

    The file name contains a digest of the content. A truncated file must never be loaded, since access to its missing
    pages kills the process (SIGBUS).

    Raises:
        OSError: The library cannot be written to the folder or loaded from it.
        _CompilerError: The compiler does not run.
    """
    for path in sorted(folder.glob(f"kernels-{key}-*.so")):
        whole = False
        with contextlib.suppress(OSError):  # unreadable, or removed by another process
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
        # Caches may be shared, but mkstemp creates files that only the current user can read.
        os.chmod(partial, 0o644)
        path = folder / _name(key, Path(partial).read_bytes())
        os.replace(partial, path)  # atomic, so that no other process sees a partial file
    finally:
        Path(partial).unlink(missing_ok=True)
    return _load(path)


def _name(key: str, content: bytes) -> str:
    return f"kernels-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _remove_stale(folder: Path) -> None:
    """Remove the leftovers of killed compilations."""
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
    """Compile, with OpenMP if the compiler supports it.

    Raises:
        OSError: The compilation fails, for example for lack of disk space.
        _CompilerError: The compiler does not run, or takes too long.
    """
    for threads in (["-fopenmp"], []):
        command = [compiler, *_FLAGS, *threads, *map(str, _SOURCES), "-o", out, "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_LONGEST_COMPILATION, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            raise _CompilerError(f"{compiler} does not run: {error}") from error
        if done.returncode == 0:
            return
    message = done.stderr.decode(errors="replace").strip()  # in the encoding of the compiler's locale
    raise OSError(f"{' '.join(command)} failed: {message[-500:]}")


def _processor() -> str:
    """Processor features that ``-march=native`` depends on, so that different machines can share a cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "approxdrop_lightning"


def _temporary_folder() -> Path:
    """This user's subfolder of the system's temporary folder.

    Raises:
        OSError: The folder belongs to, or is writable by, another user, so its content must not be executed.
    """
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"approxdrop_lightning-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o022:
        raise OSError(f"{folder} is not this user's alone")
    return folder


def _private_folder(stack: contextlib.ExitStack) -> Path:
    """A folder private to this process, deleted as soon as the library is loaded."""
    return Path(
        stack.enter_context(tempfile.TemporaryDirectory(prefix="approxdrop_lightning-", ignore_cleanup_errors=True))
    )
