"""The policy: whether what a dropout drops is skipped, and if not, why.

Skipping costs host time, gathers and scatters; it gains where enough multiplies are saved. The sizes from which it
gains were measured, and stand here only: layers, the pass over compiled graphs, the conversion and the backends ask,
and compare no sizes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Thresholds:
    """From where on skipping gains.

    Attributes:
        saved: Fewest multiplies that a dropout must save in one eager product. It is also what skipping costs there,
            in multiplies, by which the report estimates time.
        saved_lstm: The same for a product of an LSTM.
        saved_tiles: The same for a product with kept tiles.
        saved_compiled: The same in a compiled graph, for the products before a dropout together, and for those after.
        features: Fewest units of a dropout; of a weight's shorter side if its tiles are dropped.
        hidden: Smallest hidden size of an LSTM that reads interleaved inputs by a recurrence of our own.
        block: Smallest blocks of units that are worth reading for each of several orders, where most are kept.
    """

    saved: int
    saved_lstm: int
    saved_tiles: int
    saved_compiled: int
    features: int = 64
    hidden: int = 64
    block: int = 8


#: By kind of device; ``"tensor cores"`` are those of CUDA for 16-bit types and, if allowed, tf32. Commands are of
#: ``python -m approxdrop_lightning.benchmark``; what they gave is in docs/results.md (Speed) and docs/gpu_model.md.
THRESHOLDS = {
    # saved, features: `mlp --hidden N N --min-gain 0 --pattern row --baseline --rate .1 .3 .5 .7`, N = 16 ... 2048.
    # saved_compiled: the same networks under torch.compile (tests/graph).
    # hidden: `lstm --hidden N --consecutive 1 --min-gain 0 --pattern row --baseline`, N = 64, 128.
    # block: `lstm --hidden 256 --vocabulary 2000 --consecutive 1 --min-gain 0`: at .3 an LSTM of 256 ran at 0.9,
    # one of 512, in blocks of 8, at 1.1.
    "cpu": Thresholds(saved=20_000_000, saved_lstm=0, saved_tiles=0, saved_compiled=2_000_000),
    # `mlp --device cuda --hidden 4096 4096 --min-gain 0 --batch N` on an H100; saved_compiled was not measured.
    "cuda": Thresholds(saved=25_000_000_000, saved_lstm=25_000_000_000, saved_tiles=0, saved_compiled=100_000_000),
    "tensor cores": Thresholds(
        saved=250_000_000_000, saved_lstm=250_000_000_000, saved_tiles=0, saved_compiled=100_000_000
    ),
}
#: Nothing is too small.
_NONE = Thresholds(saved=0, saved_lstm=0, saved_tiles=0, saved_compiled=0, features=0, hidden=0, block=0)


def thresholds(device: torch.device, dtype: torch.dtype) -> Thresholds:
    """What was measured for a device and the type of a product's inputs, or that of ``torch.autocast``."""
    if device.type == "cpu":
        return THRESHOLDS["cpu"]
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    on_tensor_cores = dtype in _HALVES or (dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32)
    return THRESHOLDS["tensor cores" if on_tensor_cores else "cuda"]


def tiles_gain_by_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of kept tiles are faster by Triton's kernels than by the vendor's (docs/gpu_model.md)."""
    return device.type == "cuda" and dtype in _HALVES


@dataclass(frozen=True)
class Policy:
    """What the policy is asked, for one converted model.

    Each question is answered by why not: None if skipping gains.

    Attributes:
        min_gain: Fewest multiplies that a dropout must save in a product, whatever else was measured; None: the
            :data:`THRESHOLDS` of the device and type.
        saved: Deprecated: ``min_gain`` that leaves the other thresholds as they were measured.
        features: Deprecated: takes the place of the threshold of this name.
        hidden: Deprecated: likewise.
    """

    min_gain: int | None = None
    saved: int | None = None
    features: int | None = None
    hidden: int | None = None

    def thresholds(self, device: torch.device, dtype: torch.dtype) -> Thresholds:
        """Those that are in force."""
        found = thresholds(device, dtype)
        given = self.min_gain if self.saved is None else self.saved
        if given is None and self.features is None and self.hidden is None:
            return found
        others = found if self.min_gain is None else _NONE
        lstm = found.saved_lstm if given is None or (self.min_gain is None and not found.saved_lstm) else given
        return Thresholds(
            saved=found.saved if given is None else given,
            saved_lstm=lstm,
            saved_tiles=found.saved_tiles if self.min_gain is None else self.min_gain,
            saved_compiled=found.saved_compiled if given is None else given,
            features=others.features if self.features is None else self.features,
            hidden=others.hidden if self.hidden is None else self.hidden,
            block=0 if self.features == 0 else others.block,
        )

    def product(self, saved: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """A product of a linear layer that would save so many multiplies."""
        return _too_few(saved, self.thresholds(device, dtype).saved)

    def compiled(self, saved: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """All linear layers of a compiled graph on one side of a dropout."""
        return _too_few(saved, self.thresholds(device, dtype).saved_compiled)

    def lstm(self, saved: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """A product of an LSTM."""
        return _too_few(saved, self.thresholds(device, dtype).saved_lstm)

    def units(self, n: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """A dropout of ``n`` units."""
        least = self.thresholds(device, dtype).features
        return f"{n} features are too few to gain (fewer than {least})" if n < least else None

    def blocks(self, n: int, block_size: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """A dropout of ``n`` units in blocks that are read for each of several orders, and most of which are kept."""
        if block_size >= self.thresholds(device, dtype).block:
            return None
        return f"{n} features are too few to gain at a rate below .5 (blocks of {block_size} units)"

    def recurrence(self, hidden: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """An LSTM of that hidden size that would read interleaved inputs by a recurrence of our own."""
        least = self.thresholds(device, dtype).hidden
        return f"its hidden size {hidden} is too small to gain (below {least})" if hidden < least else None

    def tiles(self, shape: tuple[int, ...], saved: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """A weight of that shape whose tiles are dropped, which would save so many multiplies."""
        now = self.thresholds(device, dtype)
        if min(shape) < now.features:
            return f"a side of {min(shape)} is too short to gain (below {now.features})"
        return _too_few(saved, now.saved_tiles)


def _too_few(saved: int, least: int) -> str | None:
    if saved >= least:
        return None
    return f"{saved:,} multiplies saved are too few to gain (fewer than {least:,})"
