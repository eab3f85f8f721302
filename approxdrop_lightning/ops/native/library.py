"""Loads the C sources beside it, compiled once with the compiler of the machine; without one, PyTorch serves.

``APPROXDROP_NATIVE=0`` turns it off. The library is kept in the user's cache folder, under a name that holds the
source, the compiler and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from approxdrop_lightning.patterns.units import UnitsStruct

_SOURCES = [Path(__file__).with_name(name) for name in ("copies.c", "product.c", "recurrence.c", "one_pass.c")]
_HEADERS = [Path(__file__).with_name(name) for name in ("kernels.h", "tile.h")]
# Not -ffast-math: linking with it would change the rounding of tiny numbers for the whole process.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-std=gnu11")
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
    """The compiled kernels, or None where there is no compiler, or it is turned off."""
    if os.environ.get("APPROXDROP_NATIVE", "1") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).warning(
            "the kernels of approxdrop_lightning were not compiled; without them skipping may take longer than "
            "it saves: %s",
            error,
        )
        return None
    for name, signature in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = signature, None
        if name in _ALLOCATING:
            function.restype, function.errcheck = _INT, _check_memory
    return loaded


def _check_memory(lacking: int, function: Any, arguments: Any) -> None:
    if lacking:
        raise MemoryError(f"{function.__name__}: no memory for its work space")


def _compiled() -> Path:
    """Path of the library; compiled now if it has not been yet."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C compiler was found")
    key = hashlib.sha256(
        b"\0".join(
            [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
            + [text.encode() for text in (repr(_FLAGS), compiler, _processor())]
        )
    ).hexdigest()[:16]
    path = _cache_folder() / f"kernels-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".so")
        os.close(handle)
        try:
            _run(compiler, partial)
            os.replace(partial, path)  # at once, so that no other process sees half of it
        finally:
            Path(partial).unlink(missing_ok=True)
    return path


def _run(compiler: str, out: str) -> None:
    """Compile with threads if the compiler has them."""
    for threads in (["-fopenmp"], []):
        command = [compiler, *_FLAGS, *threads, *map(str, _SOURCES), "-o", out, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode == 0:
            return
    raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


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
