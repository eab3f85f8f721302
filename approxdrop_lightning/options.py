"""The options of the plugin: the only place of their names, defaults, descriptions and checks."""

from __future__ import annotations

import inspect
import re
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self, TypeVar, get_type_hints

from approxdrop_lightning.distribution import CONCENTRATION, KEEP, MAX_DP, PatternDistribution, check_rate
from approxdrop_lightning.ops.backend import check_backend
from approxdrop_lightning.patterns.sampler import PatternSampler, fewest_rows
from approxdrop_lightning.policy import Policy

PATTERNS = ("row", "tile", "dropconnect")
#: Options that go with the next release and why: still honoured in this one, with a warning.
_DEPRECATED = {
    "block_size": "no measurement favours another value than 16",
    "scale": "no measurement favours another value than 'rate'",
    "min_features": "min_gain takes its place",
    "min_multiplies": "min_gain takes its place",
    "min_hidden": "min_gain takes its place",
}
#: Raised whenever the same options and generators draw other masks: 2, as many orders in layers of all widths.
SEQUENCE_RULE = 2
#: What decides, besides the rates and the seed, which patterns are drawn.
_OF_THE_SEQUENCE = (
    "pattern", "interleave", "shuffle", "block_size", "orders", "group_rows", "max_dp", "keep", "concentration",
    "search", "recurrent", "tile_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of :func:`approxdrop_lightning.approximate`, and most of :class:`approxdrop_lightning.ApproxDropout`.

    The first four, and ``seed``, are those to know; the others are advanced.

    Attributes:
        rate: Dropout rate of all sites, in [0, 1); None: each keeps the ``p`` of its own layer.
        pattern: ``"row"``: units are dropped (Song et al., DATE 2019, section 3.1). ``"tile"``: instead, tiles of the
            weights that read them (section 3.2). ``"dropconnect"``: the same weights one by one, masked and dense
            (Wan et al., 2013): the baseline of ``"tile"``.
        recurrent: Whether the recurrent inputs of LSTMs are dropped too, with one pattern per batch, layer and call,
            at the rate of the LSTM. Needs ``pattern="row"``.
        backend: ``"auto"``, ``"compact"``, ``"triton"`` or ``"reference"`` (masked and dense: the definition).
        interleave: Whether the rows of a batch take the cells of a pattern in turn; otherwise they share one mask.
        shuffle: Whether units are permuted, anew for each pattern, before they are divided into cells.
        orders: Most orders of the units that the rows of a batch take in turn, >= 1: more of them make the gradient
            less noisy. Small batches have fewer. None: 8 for sequences, 16 for samples, and up to 32 for these in
            large batches (64 rows and more in a group). Needs ``interleave`` and ``shuffle``.
        group_rows: Fewest rows that several orders may leave a group, >= 1. Fewer rows make more masks, which high
            rates and learning rates want; more rows make faster products. None: 8 at rate .5,
            more below and fewer above, in proportion to ``(1 - rate) / rate``.
        max_dp: Largest period, an integer >= 1 and at least ``1 / (1 - rate)``.
        keep: ``"one"`` cell of ``dp``, as in the paper, or ``"any"`` number.
        concentration: 0: the most random distribution (the paper's); large: the dropped share hardly varies.
        search: ``"maxent"`` (closed form) or ``"sgd"`` (the paper's search).
        tile_size: Largest side of a tile, >= 1; small weights have smaller ones. For ``pattern="tile"``.
        min_gain: Fewest multiplies that a dropout must save in one product (rows times inputs times outputs times
            rate), lest skipping cost more time than it saves; 0: skip whatever can be skipped; None: the thresholds
            measured for the device, the type and the kind of layer (:data:`.policy.THRESHOLDS`).
        pattern_everywhere: Whether dropouts by which nothing is skipped drop by patterns as well, as masks, for
            studies of these; otherwise they are stock dropout.
        min_features: Deprecated. Units below which a dropout skips nothing; of the shorter side of a weight, if tiles
            are dropped.
        min_multiplies: Deprecated. ``min_gain`` of linear layers alone.
        min_hidden: Deprecated. Hidden size below which the vendor's kernel runs an LSTM.
        block_size: Deprecated. Most units permuted together, >= 1; narrow layers take smaller blocks.
        scale: Deprecated. ``"rate"``: kept values times ``1 / (1 - rate)``; ``"dp"``: times ``dp / keep``.
    """

    rate: float | None = None
    pattern: str = "row"
    recurrent: bool = False
    backend: str = "auto"
    interleave: bool = True
    shuffle: bool = True
    orders: int | None = None
    group_rows: int | None = None
    max_dp: int = MAX_DP
    keep: str = KEEP
    concentration: float = CONCENTRATION
    search: str = "maxent"
    tile_size: int = 32
    min_gain: int | None = None
    pattern_everywhere: bool = False
    min_features: int | None = None
    min_multiplies: int | None = None
    min_hidden: int | None = None
    block_size: int = 16
    scale: str = "rate"

    @classmethod
    def from_keywords(cls, owner: str, keywords: dict[str, Any]) -> Self:
        """Make options of a user's keyword arguments.

        Args:
            owner: Who was given them, for messages.
            keywords: Names and values.

        Raises:
            TypeError: There is no option of a name.
            ValueError: A value is outside of its range, or a rate is not feasible.

        Warns:
            FutureWarning: An option is deprecated.
        """
        known = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in known:
                allowed = ", ".join(option for option in known if option not in _DEPRECATED)
                raise TypeError(f"{owner} has no option {name!r}; there are {allowed}")
            if name in _DEPRECATED and keywords[name] != getattr(cls, name):
                warnings.warn(
                    f"{owner}: {name} is deprecated and goes in the next release: {_DEPRECATED[name]}",
                    FutureWarning,
                    stacklevel=3,
                )
        return cls(**keywords)

    def __post_init__(self) -> None:
        check_choice("pattern", self.pattern, PATTERNS)
        check_choice("scale", self.scale, ("rate", "dp"))
        least = {"block_size": 1, "orders": 1, "group_rows": 1, "tile_size": 1}
        least |= dict.fromkeys(("min_gain", "min_features", "min_multiplies", "min_hidden"), 0)
        for name, low in least.items():
            value = getattr(self, name)
            if value is None and getattr(Options, name) is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        for name in ("interleave", "shuffle", "recurrent", "pattern_everywhere"):
            check_flag(name, getattr(self, name))
        if self.recurrent and self.pattern != "row":
            raise ValueError(f"recurrent=True needs pattern='row', got {self.pattern!r}")
        check_backend(self.backend)
        if self.rate is not None:
            check_rate(self.rate)
        # Checks max_dp, keep, concentration and search even where the rates are the model's.
        self.distribution(0.0 if self.rate is None else self.rate)

    @property
    def policy(self) -> Policy:
        """Decides what is skipped."""
        return Policy(
            min_gain=self.min_gain,
            everywhere=self.pattern_everywhere,
            saved=self.min_multiplies,
            features=self.min_features,
            hidden=self.min_hidden,
        )

    def distribution(self, rate: float) -> PatternDistribution:
        """The distribution over ``(dp, keep)`` for a rate."""
        return PatternDistribution.search(rate, self.max_dp, self.search, self.keep, self.concentration)

    def sampler(self, rate: float, seed: int, rank: int = 0, pair: tuple[int, int] | None = None) -> PatternSampler:
        """A sampler of patterns of a rate, or of a pair ``(dp, keep)``."""
        fixed = None if pair is None else PatternDistribution((pair,), (1.0,), (pair[0] - pair[1]) / pair[0])
        return PatternSampler(
            fixed or self.distribution(rate),
            interleave=self.interleave,
            shuffle=self.shuffle,
            block_size=self.block_size,
            seed=seed,
            rank=rank,
            tile_size=self.tile_size,
            orders=self.orders,
            group_rows=fewest_rows(rate) if self.group_rows is None else self.group_rows,
        )


@dataclass(frozen=True, kw_only=True)
class CallbackOptions(Options):
    """Options of :class:`approxdrop_lightning.ApproxDropout`: those of :class:`Options`, and those about training.

    Attributes:
        seed: Seed of the patterns; None takes that of ``seed_everything``, else PyTorch's initial seed. The global
            generators are never used.
        resample: ``"batch"``: patterns are drawn for each batch; ``"step"``: for each optimizer step, so that the
            batches accumulated for it share them.
        sync_patterns: Whether the processes of a distributed run draw the same patterns. They always draw the same
            ``(dp, keep)``, so that none waits for another.
        untested_strategies: Whether to run under strategies other than a single device and DDP.
    """

    seed: int | None = None
    resample: str = "batch"
    sync_patterns: bool = False
    untested_strategies: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"seed must be an integer or None, got {self.seed!r}")
        check_choice("resample", self.resample, ("batch", "step"))
        for name in ("sync_patterns", "untested_strategies"):
            check_flag(name, getattr(self, name))


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of those allowed."""
    if value not in allowed:
        choices = " or ".join(map(repr, allowed)) if len(allowed) == 2 else f"one of {', '.join(map(repr, allowed))}"
        raise ValueError(f"{name} must be {choices}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_same_sequence(saved: dict[str, Any], options: Options, rule: int = SEQUENCE_RULE) -> None:
    """Check that a saved sequence of patterns can go on; an option that its version did not have is left out.

    Warns:
        UserWarning: It was drawn by another rule.

    Raises:
        ValueError: An option that decides which patterns are drawn has another value.
    """
    if rule != SEQUENCE_RULE and "group_rows" in saved:
        warnings.warn(
            "the checkpoint is of a version that drew fewer orders of the units in narrow layers: the sequence of "
            "(dp, keep) goes on, the masks are not those that version would have drawn",
            UserWarning,
            stacklevel=2,
        )
    if saved and "group_rows" not in saved:
        warnings.warn(
            "the checkpoint is of a version that drew several orders of the units for sequences only: the sequence "
            "of (dp, keep) goes on, the masks are not those that version would have drawn",
            UserWarning,
            stacklevel=2,
        )
    for name in _OF_THE_SEQUENCE:
        value = getattr(options, name)
        if saved.get(name, value) != value:
            raise ValueError(f"{name} was {saved[name]!r}, now it is {value!r}")


def defaults(options: type[Options]) -> dict[str, Any]:
    """Options that are not deprecated, each with its default."""
    return {f.name: f.default for f in fields(options) if f.name not in _DEPRECATED and f.default is not MISSING}


_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes(options: type[Options]) -> Callable[[_Function], _Function]:
    """Give ``f(self, rate=None, **options)`` the options' signature, for ``help()``, editors and command lines."""

    def decorate(function: _Function) -> _Function:
        types = get_type_hints(options)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        listed = [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD if name == "rate" else inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=types[name],
            )
            for name, default in defaults(options).items()
        ]
        function.__signature__ = inspect.Signature([own, *listed])  # type: ignore[attr-defined]
        function.__annotations__ = {name: types[name] for name in defaults(options)} | {"return": None}
        return function

    return decorate


def described(options: type[Options]) -> str:
    """An ``Args:`` section of the options that are not deprecated, for the docstring of a class that takes them."""
    lines = []
    for cls in reversed(options.__mro__):
        text = inspect.cleandoc(vars(cls).get("__doc__") or "")
        section = text.partition("Attributes:\n")[2]
        entries = re.split(r"\n(?=    \w+: )", section.partition("\n\n")[0])
        lines += [e for e in entries if e.strip() and e.split(":")[0].strip() not in _DEPRECATED]
    return "Args:\n" + textwrap.indent(textwrap.dedent("\n".join(lines)), "    ")
