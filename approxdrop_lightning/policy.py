"""The policy: whether what a dropout drops is skipped, or stock dropout runs, and why.

Skipping costs host time, gathers and scatters; it gains where enough multiplies are saved. The sizes from which it
gains were measured, and stand here only: layers, the pass over compiled graphs, the conversion and the backends ask,
and compare no sizes of their own. *How* a product is computed, such as by which kernel, is for those who compute it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch

_HALVES = (torch.float16, torch.bfloat16)
#: More rows than any batch has.
_NEVER = 1 << 62
#: Whether the step under way is to be replayed as a CUDA graph, in which the host's part is no longer there.
REPLAYED: ContextVar[bool] = ContextVar("replayed", default=False)


@dataclass(frozen=True)
class Thresholds:
    """From where on skipping gains on one kind of device, for one kind of type.

    Each question is answered by the reason against skipping: None if it gains.

    Attributes:
        saved: Fewest multiplies that a dropout must save in one eager product. It is also what skipping costs there,
            in multiplies, by which the report estimates time.
        saved_lstm: The same for a product of an LSTM.
        saved_tiles: The same for a product with kept tiles.
        saved_compiled: The same in a compiled graph, for all products beside a dropout together. Those before it must
            save a tenth of that to compute kept outputs only.
        saved_replayed: The same for compiled graphs in steps that are replayed as CUDA graphs.
        whole: What it costs that something reads a value of the dense output, in multiplies: kept values are put in
            their places, and their gradients are packed.
        residual: Whether to skip where only the layer before a dropout saves, as in a residual sum. It costs quality:
            the few masks of a batch reach all later layers (docs/results.md, Transformers).
        group_rows: Fewest rows per group if rows alternate between several orders, in eager layers. On CUDA they
            never do: each group takes several launches from Python.
        group_rows_compiled: The same in compiled graphs. On CUDA each order packs part of the weight again, which
            takes as long as multiplying by some hundred rows, and smaller products are slower.
        features: Fewest units of a dropout.
        side: Fewest rows and columns of a weight whose tiles are dropped.
        hidden: Smallest hidden size of an LSTM that reads interleaved inputs by a recurrence of our own.
        sequence: Fewest units of a dropout of sequences, but for those of networks with an LSTM from rate .5 on.
            Narrower ones gain little time, and cost quality (docs/results.md, Transformers).
    """

    saved: int
    saved_lstm: int
    saved_tiles: int
    saved_compiled: int
    saved_replayed: int
    whole: int
    residual: bool = False
    group_rows: int = 1
    group_rows_compiled: int = 1
    features: int = 128
    side: int = 64
    hidden: int = 64
    sequence: int = 512

    def product(self, saved: int) -> str | None:
        """A product of a linear layer that would save so many multiplies."""
        return _too_few(saved, self.saved)

    def lstm(self, saved: int) -> str | None:
        """A product of an LSTM."""
        return _too_few(saved, self.saved_lstm)

    def compiled(self, saved: int) -> str | None:
        """All linear layers of a compiled graph beside a dropout."""
        return _too_few(saved, self._saved_compiled)

    def before_compiled(self, saved: int) -> bool:
        """Whether those before a dropout that skips compute kept outputs only."""
        return 10 * saved >= self._saved_compiled

    @property
    def _saved_compiled(self) -> int:
        return self.saved_replayed if REPLAYED.get() else self.saved_compiled

    def tiles(self, shape: tuple[int, ...], saved: int) -> str | None:
        """A weight of that shape whose tiles are dropped, which would save so many multiplies."""
        if min(shape) < self.side:
            return f"a side of {min(shape)} is too short to gain (below {self.side})"
        return _too_few(saved, self.saved_tiles)

    def units(self, n: int, of_sequences: bool = False) -> str | None:
        """A dropout of ``n`` units; ``of_sequences``: which gains for wide sequences only."""
        if n < self.features:
            return f"{n} features are too few to gain (fewer than {self.features})"
        if of_sequences and n < self.sequence:
            return (
                f"{n} features of sequences are too few to gain (fewer than {self.sequence}; "
                f"from rate .5 on, in networks with an LSTM, {self.features})"
            )
        return None

    def recurrence(self, hidden: int) -> str | None:
        """An LSTM of that hidden size that would read interleaved inputs by a recurrence of our own."""
        return (
            f"its hidden size {hidden} is too small to gain (below {self.hidden})" if hidden < self.hidden else None
        )

    def any_product(self, saved: int, lstm: bool, tiles: bool) -> str | None:
        """The product that would save most: the largest weight of the model, between so many rows.

        Args:
            saved: Multiplies.
            lstm: Whether it may be one of an LSTM.
            tiles: Whether tiles are dropped.
        """
        least = self.saved_tiles if tiles else self.saved
        return _too_few(saved, min(least, self.saved_lstm) if lstm else least)

    def residual_sum(self, readers: Iterable[str]) -> str | None:
        """A dropout that only layers before it save by, whose output functions of these names read whole."""
        return None if self.residual else f"read whole by {', '.join(sorted(readers))}, where few masks cost quality"

    def together(self, saved: Iterable[int], whole: int) -> str | None:
        """A dropout whose products save so many multiplies each, and of which so many values are read whole too."""
        gain, cost = sum(saved), whole * self.whole
        if gain >= cost:
            return None
        return f"{gain:,} multiplies saved are fewer than those that reading {whole:,} values whole costs ({cost:,})"


#: By kind of device; ``"tensor cores"`` are those of CUDA for 16-bit types and, if allowed, tf32. Commands are of
#: ``python -m approxdrop_lightning.benchmark``; what they gave is in docs/results.md (Speed) and docs/gpu_model.md.
THRESHOLDS = {
    # saved, features: `mlp --hidden N N --min-gain 0 --pattern row --baseline --rate .1 .3 .5 .7`, N = 16 ... 2048.
    # saved_compiled: the same networks under torch.compile (tests/graph).
    # hidden: `lstm --hidden N --consecutive 1 --min-gain 0 --pattern row --baseline`, N = 64, 128.
    # sequence: `lstm --hidden N --vocabulary 2000 --consecutive 1 --min-gain 0 --rate .3`: an LSTM of 256 ran at 0.9,
    # one of 512 at 1.1; and perplexities of a transformer of 256.
    # whole: functional.unpack and its backward pass took 0.5 to 2.3 ns a value, a multiply (with those of both
    # gradients) .063; stock dropout would take 7 to 14 ns for its mask, of which nothing is counted here.
    "cpu": Thresholds(
        saved=10_000_000, saved_lstm=0, saved_tiles=0, saved_compiled=2_000_000, saved_replayed=2_000_000, whole=32
    ),
    # saved: `mlp --device cuda --hidden 4096 4096 --min-gain 0 --batch N` on an H100.
    # saved_compiled, saved_replayed: `gpu` on an H200. Skipping cost the host .4 to .8 ms for each dropout, and .1 to
    # .2 ms in a step that is replayed; this is what the GPU multiplies in that time, forward and backward.
    # group_rows: `gpu`, eager steps (18 to 35 ms with several orders); group_rows_compiled: its products and copies.
    # whole: not measured; by bytes.
    "cuda": Thresholds(
        saved=25_000_000_000, saved_lstm=25_000_000_000, saved_tiles=0,
        saved_compiled=5_000_000_000, saved_replayed=2_500_000_000, whole=100,
        group_rows=_NEVER, group_rows_compiled=2048,
    ),
    "tensor cores": Thresholds(
        saved=250_000_000_000, saved_lstm=250_000_000_000, saved_tiles=0,
        saved_compiled=100_000_000_000, saved_replayed=30_000_000_000, whole=2000,
        group_rows=_NEVER, group_rows_compiled=2048,
    ),
}  # fmt: skip
#: Nothing is too small.
_NONE = Thresholds(
    saved=0, saved_lstm=0, saved_tiles=0, saved_compiled=0, saved_replayed=0, whole=0, residual=True,
    features=0, side=0, hidden=0, sequence=0,
)  # fmt: skip


def measured(device: torch.device, dtype: torch.dtype) -> Thresholds:
    """What was measured for a device and the type of a product's inputs."""
    if device.type == "cpu":
        return THRESHOLDS["cpu"]
    on_tensor_cores = dtype in _HALVES or (dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32)
    return THRESHOLDS["tensor cores" if on_tensor_cores else "cuda"]


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Type in which a product of inputs of a type is formed: that of ``torch.autocast``, if it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def tiles_gain_by_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of kept tiles are faster by Triton's kernels than by the vendor's (docs/gpu_model.md)."""
    return device.type == "cuda" and dtype in _HALVES


@dataclass(frozen=True)
class Policy:
    """What decides for one converted model.

    Attributes:
        min_gain: Fewest multiplies that a dropout must save in a product, whatever else was measured; None: the
            :data:`THRESHOLDS` of the device and type.
        everywhere: Whether a dropout by which nothing is skipped drops by a pattern too, as a mask; else it is stock.
        saved: Deprecated: ``min_gain`` that leaves the other thresholds as they were measured.
        features: Deprecated: takes the place of the threshold of this name.
        hidden: Deprecated: likewise.
    """

    min_gain: int | None = None
    everywhere: bool = False
    saved: int | None = None
    features: int | None = None
    hidden: int | None = None

    def at(self, device: torch.device, dtype: torch.dtype) -> Thresholds:
        """The thresholds in force for a device and the type of a product's inputs."""
        found = measured(device, dtype)
        if self.min_gain is not None:
            least = self.min_gain
            found = replace(
                _NONE, saved=least, saved_lstm=least, saved_tiles=least, saved_compiled=least, saved_replayed=least,
                group_rows=found.group_rows, group_rows_compiled=found.group_rows_compiled,
            )  # fmt: skip
        if self.saved is not None:
            lstm = self.saved if found.saved_lstm else 0
            found = replace(
                found, saved=self.saved, saved_lstm=lstm, saved_compiled=self.saved, saved_replayed=self.saved
            )
        if self.features is not None:
            found = replace(
                found, features=self.features, side=self.features, sequence=found.sequence if self.features else 0
            )
        return found if self.hidden is None else replace(found, hidden=self.hidden)

    def state(self) -> list[object]:
        """What decisions depend on: those that were made by another state do not hold."""
        given = [self.min_gain, self.everywhere, self.saved, self.features, self.hidden]
        return given + [list(vars(thresholds).values()) for thresholds in THRESHOLDS.values()]


def _too_few(saved: int, least: int) -> str | None:
    if saved >= least:
        return None
    return f"{saved:,} multiplies saved are too few to gain (fewer than {least:,})"
