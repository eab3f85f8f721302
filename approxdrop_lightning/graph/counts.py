"""Counters of what the pass has rewritten, over all graphs: for tests and logs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Number of rewrites since the last :meth:`clear`.

    Attributes:
        graphs: Graphs that contained a dropout.
        producers: Linear layers that compute kept outputs only.
        consumers: Linear layers that read kept inputs only.
        unpacked: Packed outputs that were also needed dense.
        masked: Dropouts of a dense tensor that were needed dense.
        native: Dropouts that were left to PyTorch because skipping would not gain.
    """

    graphs: int = 0
    producers: int = 0
    consumers: int = 0
    unpacked: int = 0
    masked: int = 0
    native: int = 0

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]  # back to the defaults


COUNTS = Counts()
