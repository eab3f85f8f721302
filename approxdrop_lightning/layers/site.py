"""Dropout sites: draw the pattern of each use and apply it."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from approxdrop_lightning.graph.book import Book, Drawn
from approxdrop_lightning.layers.combined import Combination, PendingCombination
from approxdrop_lightning.layers.compact_tensor import CompactTensor
from approxdrop_lightning.layers.draws import Draws
from approxdrop_lightning.layers.kept import Kept
from approxdrop_lightning.layers.lazy_tensor import as_dense, is_ordinary, shape_of
from approxdrop_lightning.layers.made_by import read_whole_before
from approxdrop_lightning.layers.pending import Pending, PendingLinear
from approxdrop_lightning.layers.stacked import StackedTensor
from approxdrop_lightning.layers.use import Key, Use
from approxdrop_lightning.layers.waiting import backward_passes, note_backward
from approxdrop_lightning.ops.derivative import batch_of_transforms, is_transformed, outside_of_transforms
from approxdrop_lightning.patterns.joined import join
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.sampler import PatternSampler
from approxdrop_lightning.patterns.tile import BernoulliPattern, TilePattern
from approxdrop_lightning.policy import Policy, Thresholds, measured, product_dtype

if TYPE_CHECKING:
    from approxdrop_lightning.layers.tiled_tensor import Patterns

Pattern = RowPattern | TilePattern | BernoulliPattern | Drawn

_Draw = TypeVar("_Draw")
#: Shapes of inputs that a site holds decisions for at most.
_MOST_HELD = 1024
#: Backward passes of one step at which it says that there are too many.
_MANY_PASSES = 100
_WARNED: weakref.WeakSet[PatternSampler] = weakref.WeakSet()


class Site:
    """One dropout: its rate, its patterns, and the layers found before and after it.

    Each use of a forward pass has a pattern of its own. Patterns stay until :meth:`begin` with ``fresh``.

    Args:
        name: Name in the model, for the report.
        rate: Share of units dropped in expectation, in (0, 1).
        sampler: Source of the patterns, shared with the other sites of this rate.
        scale: ``"rate"``: kept values times ``1 / (1 - rate)``; ``"dp"``: times ``dp / keep`` of the pattern.
        policy: Says what is masked and computed densely because skipping would not gain.
        backend: Backend of packing.
    """

    def __init__(
        self,
        name: str,
        rate: float,
        sampler: PatternSampler,
        scale: str = "rate",
        policy: Policy | None = None,
        backend: str = "auto",
    ) -> None:
        self.name, self.rate, self.sampler = name, rate, sampler
        self.scale_by, self.backend = scale, backend
        self.policy = Policy(min_gain=0) if policy is None else policy
        #: Multiplies of the largest product between one row and the next layer, of all the model's weights; and
        #: whether one of them is an LSTM's. None: not known.
        self.largest: int | None = None
        self.beside_lstm = False
        #: Whether a use has been open in the step; whether a stock layer is in its place.
        self.opened = self.resting = False
        #: By shape of the input: what was seen, and what follows from it.
        self.uses: dict[Key, Use] = {}
        #: What was seen so far: layers before it and after it, functions that read it whole, steps begun.
        self.producers: set[str] = set()
        self.consumers: set[str] = set()
        self.dense_readers: set[str] = set()
        #: Layers before it whose outputs something else reads whole, so that none of their rows are skipped.
        self.whole: dict[str, str] = {}
        #: Why a use was masked and computed densely, if one was.
        self.too_small: str | None = None
        #: Why a stock layer drops in its place, if one does.
        self.conventional: str | None = None
        #: What a product that skips costs beyond its multiplies, in multiplies, as the policy takes it.
        self.overhead = 0
        #: Whether a compiled graph ran it as a mask, its backend not knowing the operator.
        self.graph_masked = False
        #: For its uses in compiled graphs: whether they skip or mask (True), or are PyTorch's own dropout (False).
        self.in_graphs: set[bool] = set()
        #: Whether it ran eagerly because no more graphs could be compiled.
        self.beyond_limit = False
        #: Patterns of compiled graphs.
        self.book: weakref.ref[Book] | None = None
        self.steps = 0
        self._patterns: Draws[RowPattern] = Draws(name)
        self._passes, self._pass_of_last_draw = 0, backward_passes()

    @property
    def last_patterns(self) -> tuple[Pattern, ...]:
        """Patterns of the last training forward, in order of use."""
        eager, book = self._patterns.used(), None if self.book is None else self.book()
        return eager if eager or book is None else book.drawn(self)

    @property
    def draws(self) -> Draws[RowPattern] | Draws[Patterns]:
        """What it has drawn in this step."""
        return self._patterns

    @property
    def scale(self) -> float:
        """Factor of the kept values in this step."""
        if self.scale_by == "dp":
            return self.sampler.dp / self.sampler.keep
        return 1 / (1 - self.rate)

    @property
    def drew_on_host(self) -> bool:
        """Whether an eager layer has used a pattern since the step began."""
        return self.draws.uses > 0

    def begin(self, fresh: bool = True) -> None:
        """Begin a forward pass: with fresh patterns, or with those of the last one again."""
        self.draws.begin(fresh)
        self._passes, self._pass_of_last_draw = 0, backward_passes()
        self.steps += 1

    def forget_patterns(self) -> None:
        """Discard the patterns: stock dropout takes its place."""
        self.draws.begin()

    @property
    def skips(self) -> list[str]:
        """What is skipped, as far as is known."""
        return (["producer's rows"] if self.producers else []) + (["consumers' columns"] if self.consumers else [])

    @property
    def remarks(self) -> list[str]:
        """What is not."""
        readers = ", ".join(sorted(self.dense_readers))
        before = [f"{layer} is read whole by {reader}" for layer, reader in sorted(self.whole.items())]
        eager = ["in part eager: the limit of graphs of torch.compile is reached"] if self.beyond_limit else []
        if self.skips:
            return [*(["read whole by " + readers] if readers else []), *([] if self.producers else before), *eager]
        nothing = ", ".join(before) or "no linear layer before it"
        return [f"{nothing}, and read whole by {readers or 'nobody'}", *eager]

    def use(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Use:
        """The use at inputs of a shape: open, or decided before, by sizes alone or by those of other rows."""
        key = shape, product_dtype(device, dtype), device.type
        use = self.uses.get(key)
        if use is None:
            if len(self.uses) == _MOST_HELD:
                del self.uses[next(iter(self.uses))]
            use = self.uses[key] = Use(self, key, self.policy.at(device, key[1]))
            self.overhead = measured(device, key[1]).saved
        if use.skips is None:
            if not use.seen and self.decides:
                self._decide_by_sizes(use)
            self.opened |= use.skips is None
        return use

    def _decide_by_sizes(self, use: Use) -> None:
        *leading, n = use.key[0]
        rows = math.prod(leading)
        reason = self._against(use.ask, use.key[0])
        if reason is not None:
            use.decide(reason)
            return
        for other in self.uses.values():
            alike = other.key[1:] == use.key[1:] and len(other.key[0]) == len(leading) + 1 and other.key[0][-1] == n
            if alike and other.skips is not None and other.by_readers:
                known = math.prod(other.key[0][:-1])
                if known <= rows if other.skips else known >= rows:
                    use.follow(other, rows / known)
                    return

    def too_narrow(self, ask: Thresholds, shape: tuple[Any, ...]) -> str | None:
        """Why an input of this shape has too few units for anything to be skipped; None if it has not."""
        wide = self.sampler.interleave and (self.rate < 0.5 or not self.beside_lstm)
        return ask.units(shape[-1], of_sequences=wide and len(shape) > 2)

    def _against(self, ask: Thresholds, shape: tuple[int, ...]) -> str | None:
        """Why nothing is skipped of an input of this shape, whoever reads it; None if that depends."""
        reason = self.too_narrow(ask, shape)
        if reason is not None or self.largest is None:
            return reason
        saved = int(self.largest * math.prod(shape[:-1]) * self.rate)
        return ask.any_product(saved, self.beside_lstm, tiles=False)

    def refuse(self, reason: str | None) -> bool:
        """Whether there is a reason against skipping; it is noted."""
        if reason is not None and self.too_small is None:
            self.too_small = reason
        return reason is not None

    @property
    def decides(self) -> bool:
        """Whether it is stock where nothing is skipped."""
        return True

    def unread(self, use: Use) -> str:
        """Why nothing is skipped at a use, if no product was too small."""
        before = [f"{layer} is read whole by {reader}" for layer, reader in sorted(use.read_before.items())]
        readers = ", ".join(sorted(use.whole))
        return f"{', '.join(before) or 'no linear layer before it'}, and read whole by {readers or 'nobody'}"

    @property
    def is_stock(self) -> bool:
        """Whether stock dropout runs in its place, at every shape that was seen."""
        return bool(self.uses) and all(use.is_stock for use in self.uses.values())

    @property
    def is_native(self) -> bool:
        """Whether compiled graphs contain PyTorch's own dropout in its place, and it does not run eagerly."""
        return self.in_graphs == {False} and not self.uses

    @property
    def reason(self) -> str | None:
        """Why nothing is skipped, if that is decided for every shape."""
        if not self.uses or any(use.skips is not False for use in self.uses.values()):
            return None
        return next(iter(self.uses.values())).reason

    def sum_up(self) -> None:
        """Keep the neighbours of uses that skip something only."""
        if self.uses:
            skipping = [use for use in self.uses.values() if use.skips is not False]
            self.producers = {name for use in skipping for names in use.before for name in names}
            self.consumers = {name for use in skipping for name in use.after}
            self.dense_readers = {name for use in skipping for name in use.whole}

    def pattern(
        self,
        n: int,
        shared: bool = False,
        leading_shape: tuple[int, ...] = (),
        widths: tuple[int, ...] = (),
        group_rows: int = 1,
    ) -> RowPattern:
        """The pattern of the next use.

        Args:
            n: Number of units.
            shared: Whether it is one for all rows of the batch.
            leading_shape: Shape of the batch.
            widths: Units of each tensor of which ``n`` are the concatenation, if each is to have its own pattern.
            group_rows: Fewest rows of a group that several orders may leave, whatever the sampler allows.
        """

        def draw() -> RowPattern:
            if widths and self.sampler.keep < self.sampler.dp:
                drawn = [self.sampler.pattern(width, shared, leading_shape, group_rows) for width in widths]
                found = join(drawn)
                if found is not None:
                    return found
            return self.sampler.pattern(n, shared, leading_shape, group_rows)

        return self._next(self._patterns, draw, lambda pattern: pattern.n == n)

    def _next(self, draws: Draws[_Draw], draw: Callable[[], _Draw], fits: Callable[[_Draw], bool]) -> _Draw:
        """What is drawn for the next use: anew, or again if the step is one and it still fits."""

        def checked() -> _Draw:
            self._check_resampled()
            return draw()

        return draws.next(checked, fits)

    def watch_passes(self, y: Tensor) -> None:
        """Notice the backward pass of a tensor that has no node of ours."""
        if self.steps < 2 and y.requires_grad:  # has resample been forgotten? Later it has not.
            y.register_hook(note_backward)

    def _check_resampled(self) -> None:
        """Warn once if steps go by and nobody says so."""
        self._count_passes()
        if self._passes >= _MANY_PASSES:
            self._warn_of_passes(f"all with (dp, keep) = ({self.sampler.dp}, {self.sampler.keep})")

    def check_resampled_before_rest(self) -> None:
        """Warn once if the model evaluates after steps of which nobody has said that they begin.

        Its layers are stock ones then, until somebody does. One backward pass may have been a trial.
        """
        self._count_passes()
        if self.drew_on_host and self._passes >= (_MANY_PASSES if self.steps else 2):
            self._warn_of_passes("and the model evaluates: its layers are stock ones until it is called")

    def _count_passes(self) -> None:
        """Count one backward pass if there was any since the last pattern was drawn.

        Passes between which nothing is drawn are those of other models.
        """
        last = backward_passes()
        self._passes += self.drew_on_host and last != self._pass_of_last_draw
        self._pass_of_last_draw = last

    def _warn_of_passes(self, what: str) -> None:
        if self.sampler not in _WARNED:
            _WARNED.add(self.sampler)
            since = "since resample(model) was last called" if self.steps else "without any call of resample(model)"
            warnings.warn(
                f"{self.name}: {self._passes} backward passes {since}, {what}; call it before each training step",
                stacklevel=3,
            )

    def read_kept(self, name: str) -> None:
        """A layer of that name reads kept units only."""
        self.consumers.add(name)

    def read_whole(self, name: str) -> None:
        """A function of that name reads everything, zeros too."""
        self.dense_readers.add(name)

    def drop(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Dropout of ``x`` (``[..., n]``): stock, or by the next pattern.

        What a pattern drops of a pending product is not computed. ``inplace`` is for stock dropout.
        """
        if not is_ordinary(x):
            return self.drop_conventionally(x, inplace)
        shape = shape_of(x)
        if not shape or 0 in shape or self.rate == 0:
            return F.dropout(as_dense(x), self.rate, True, inplace)
        if isinstance(x, StackedTensor) and x.waits and not self.use(*x.kind_of_parts).is_stock:
            return x.of_each(partial(self.drop, inplace=inplace))  # each part by a pattern of its own
        source = x if isinstance(x, (PendingLinear, PendingCombination)) and x.is_lazy else None
        pending = None if source is None else source.held
        kind = (x.device, x.dtype) if pending is None else (pending.device, pending.dtype)
        use = self.use(shape, *kind)
        if use.is_stock:
            return F.dropout(as_dense(x), self.rate, True, inplace)
        if is_transformed():
            return self._under_transforms(as_dense(x))
        widths = pending.widths if isinstance(pending, Combination) else ()
        if widths and use.ask.units(min(widths)) is not None:
            widths = ()
        pattern = self.pattern(shape[-1], leading_shape=shape[:-1], widths=widths, group_rows=use.ask.group_rows)
        use.unseen |= pattern.keeps_all
        if pattern.keeps_all:
            return as_dense(x) * self.scale
        if use.skips is False:  # a mask is asked for all the same
            x = as_dense(x)
            y = x * pattern.mask(*shape[:-1], dtype=x.dtype, value=self.scale, device=x.device)
            self.watch_passes(y)
            return y
        use.seen |= torch.is_grad_enabled()
        if pending is not None and source is not None and self._packs(use, pending):
            return pending.dropped(pattern, use, self.scale, source)
        if isinstance(x, StackedTensor):
            x._read_by("stack")
        x = as_dense(x)  # a mask or packed, as its readers wish
        if use.skips is None and not use.before:
            use.note_before(read_whole_before(x))
        return CompactTensor(Kept(shape, pattern, shape[:-1], use, x, packed=False, scale=self.scale))

    def drop_conventionally(self, x: Tensor, inplace: bool) -> Tensor:
        """Conventional dropout of an input that has no units of its own, or whose class is somebody else's."""
        if isinstance(x, Tensor):
            kind = "nested" if x.is_nested else "sparse" if x.layout is not torch.strided else type(x).__name__
            self.conventional = f"conventional dropout of {kind} tensors"
        return F.dropout(x, self.rate, True, inplace)

    @staticmethod
    def _packs(use: Use, pending: Pending | Combination) -> bool:
        """Whether the layers before a use compute kept units only."""
        names = pending.names
        if use.skips:
            return names in use.before
        if use.saves_too_few(pending.multiplies):
            return False
        use.made_by(names, pending.multiplies)
        return True

    def _under_transforms(self, x: Tensor) -> Tensor:
        """Dropout by a mask: transforms of ``torch.func`` see nothing else."""
        batch, of_the_level = batch_of_transforms()
        leading = (*batch, *x.shape[:-1])
        with outside_of_transforms():
            pattern = self.pattern(x.shape[-1], leading_shape=leading)
            mask = pattern.mask(*leading, dtype=x.dtype, value=self.scale, device=x.device)
        return x * of_the_level(mask)
