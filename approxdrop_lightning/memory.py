"""A malloc setting of the C library that saves training on a CPU page faults."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # <malloc.h> of glibc
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, for its own next request.

    By default glibc gives large blocks back to the system, and at the next step each of their pages costs a fault
    again: about 1 ms per MB on virtual machines, more than dropout costs. It is a setting of the whole process and
    helps conventional training as well; memory in use does not grow, but what is free stays with the process.

    Returns:
        Whether there is such a setting here: on Linux with glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER)) and bool(mallopt(_MMAP_MAX, 0))
