"""What a user may ask for, checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from approxdrop_lightning.distribution import CONCENTRATION, KEEP, MAX_DP, PatternDistribution, check_rate
from approxdrop_lightning.ops.backend import check_backend
from approxdrop_lightning.patterns.sampler import PatternSampler

PATTERNS = ("row", "tile", "dropconnect")
#: What decides, beside the rates and the seed, which patterns are drawn.
_OF_THE_SEQUENCE = (
    "pattern", "interleave", "shuffle", "block_size", "orders", "max_dp", "keep", "concentration", "search",
    "recurrent", "tile_size",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Arguments of :class:`approxdrop_lightning.ApproxDropout` and :func:`approxdrop_lightning.approximate`.

    Attributes:
        rate: Dropout rate of all sites, in [0, 1); None: each keeps the ``p`` of its own layer.
        pattern: ``"row"``: units are dropped (Song et al., DATE 2019, section 3.1). ``"tile"``: in their place, tiles
            of the weights that read them (section 3.2). ``"dropconnect"``: the same weights one by one, masked and
            dense (Wan et al., 2013): the baseline of ``"tile"``. Arguments about units are for ``"row"``.
        interleave: Whether rows of the batch take the cells of a pattern in turn; else the batch shares it.
        shuffle: Whether units are permuted, anew for each pattern, before they are divided into cells.
        block_size: Most units permuted together, >= 1; narrow layers take smaller blocks.
        orders: Most orders of the units that the rows of a batch of sequences (``[T, B, n]``) take in turn, >= 1:
            more of them make the gradient less noisy. Batches of few rows have fewer. Without ``interleave`` and
            ``shuffle`` it is not used.
        max_dp: Largest period, >= 1.
        keep: ``"one"`` cell of ``dp``, as in the paper, or ``"any"`` number.
        concentration: 0: most random distribution (the paper's); large: the dropped share hardly varies.
        search: ``"maxent"`` (closed form) or ``"sgd"`` (the paper's search).
        scale: ``"rate"``: kept values times ``1 / (1 - rate)``; ``"dp"``: times ``dp / keep`` of the pattern.
        recurrent: Whether the recurrent inputs of LSTMs are dropped too, by one pattern per batch, layer and call, at
            the rate of the LSTM.
        tile_size: Largest side of a tile, >= 1; small weights have smaller ones. For ``pattern="tile"``.
        min_features: Sites narrower than this are masked and computed densely, and with tiles so are weights with a
            shorter side. So are sites of sequences of up to about 320 units below rate .5 (blocks narrower than 8
            units, several orders); 0: none of them.
        min_multiplies: Linear layers of which a dropout saves fewer multiplies in one call (rows times inputs times
            outputs times rate) are computed densely, and the dropout is a mask: skipping would save less time than
            its bookkeeping costs. 0: none. None: what was measured (:func:`.policy.least_saved`): 20 million on a
            CPU, thousands of times as many on a GPU, where it holds for LSTMs as well. Not for tiles.
        min_hidden: LSTMs of a smaller hidden size read interleaved inputs masked and dense, by the vendor's kernel
            (at .5, 64 ran at 0.94 of conventional dropout's speed, 128 at 1.01 and 1.14).
        backend: ``"auto"``, ``"compact"``, ``"triton"`` or ``"reference"``.
    """

    rate: float | None = None
    pattern: str = "row"
    interleave: bool = True
    shuffle: bool = True
    block_size: int = 16
    orders: int = 8
    max_dp: int = MAX_DP
    keep: str = KEEP
    concentration: float = CONCENTRATION
    search: str = "maxent"
    scale: str = "rate"
    recurrent: bool = False
    tile_size: int = 32
    min_features: int = 64
    min_multiplies: int | None = None
    min_hidden: int = 64
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(map(repr, PATTERNS))}, got {self.pattern!r}")
        if self.scale not in ("rate", "dp"):
            raise ValueError(f"scale must be 'rate' or 'dp', got {self.scale!r}")
        lowest = {
            "block_size": 1,
            "orders": 1,
            "tile_size": 1,
            "min_features": 0,
            "min_hidden": 0,
        } | ({} if self.min_multiplies is None else {"min_multiplies": 0})
        for name, low in lowest.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        for name in ("interleave", "shuffle", "recurrent"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.recurrent and self.pattern != "row":
            raise ValueError(f"recurrent=True needs pattern='row', got {self.pattern!r}")
        check_backend(self.backend)
        if self.rate is not None:
            check_rate(self.rate)
        # Checks max_dp, keep, concentration and search even where the rates are the model's.
        self.distribution(0.0 if self.rate is None else self.rate)

    def distribution(self, rate: float) -> PatternDistribution:
        """The distribution over ``(dp, keep)`` for a rate."""
        return PatternDistribution.search(rate, self.max_dp, self.search, self.keep, self.concentration)

    def sampler(self, rate: float, seed: int, rank: int = 0) -> PatternSampler:
        """A sampler of patterns of a rate."""
        return PatternSampler(
            self.distribution(rate),
            self.interleave,
            self.shuffle,
            self.block_size,
            seed,
            rank,
            self.tile_size,
            self.orders,
        )


def check_same_sequence(saved: dict[str, Any], options: Options) -> None:
    """Check that a saved sequence of patterns can go on; an option that its version did not have is left out.

    Raises:
        ValueError: An option that decides which patterns are drawn has another value.
    """
    for name in _OF_THE_SEQUENCE:
        value = getattr(options, name)
        if saved.get(name, value) != value:
            raise ValueError(f"{name} was {saved[name]!r}, now it is {value!r}")
