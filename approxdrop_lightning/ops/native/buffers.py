"""Pool of large CPU buffers, reused from step to step."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

#: Smaller buffers are allocated by PyTorch, which is cheaper than a lookup.
_KEEP_FROM_BYTES = 1 << 21
#: A buffer is freed after this many requests that did not use it.
_IDLE_REQUESTS = 1000


@dataclass
class _Entry:
    storage: torch.UntypedStorage
    last_request: int


class _Pool(threading.local):
    """Storages by size, each with the number of the last request that it served."""

    def __init__(self) -> None:
        self.requests = 0
        self.storages: dict[int, list[_Entry]] = {}

    def drop_idle(self) -> None:
        oldest = self.requests - _IDLE_REQUESTS
        for size, entries in list(self.storages.items()):
            self.storages[size] = [entry for entry in entries if entry.last_request >= oldest]


_pool = _Pool()


def buffer(shape: tuple[int, ...], like: Tensor, exact: bool = False) -> Tensor:
    """Return uninitialised memory, reused if possible.

    On the CPU, fresh memory costs a page fault per 4 KB at each step, which for a gradient exceeds what skipping
    saves. Large buffers are therefore pooled, and reused once nothing else refers to their storage. On other devices
    PyTorch's allocator already does this.

    Args:
        shape: Shape of the tensor.
        like: Tensor with the desired device and type.
        exact: Whether the size is the same at each step, as for a gradient; otherwise it is rounded up.

    Returns:
        Contiguous tensor.
    """
    size = like.element_size() * math.prod(shape)
    if size < _KEEP_FROM_BYTES or not like.is_cpu:
        return like.new_empty(shape)
    if not exact:  # round to a few sizes, by an eighth at most: the number of kept units varies from step to step
        step = 1 << (size.bit_length() - 4)
        size = -(-size // step) * step
    _pool.requests += 1
    entries = _pool.storages.setdefault(size, [])
    for entry in entries:
        if torch._C._storage_Use_Count(entry.storage._cdata) == 1:  # only the pool refers to it
            entry.last_request = _pool.requests
            return torch.empty(0, dtype=like.dtype, device="cpu").set_(entry.storage, 0, shape, ())
    _pool.drop_idle()
    with torch.inference_mode(False):
        storage = torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()
    _pool.storages[size].append(_Entry(storage, _pool.requests))
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage, 0, shape, ())


def free_buffers() -> None:
    """Free all pooled memory that is not in use."""
    _pool.storages.clear()
