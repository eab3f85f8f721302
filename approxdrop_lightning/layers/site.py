"""Dropout sites: draw the pattern of each use and apply it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from approxdrop_lightning.graph import limit
from approxdrop_lightning.graph.book import Book, Drawn
from approxdrop_lightning.graph.frames import never_alone
from approxdrop_lightning.layers.combined import Combination, PendingCombination
from approxdrop_lightning.layers.compact_tensor import CompactTensor, Kept
from approxdrop_lightning.layers.converted import Converted
from approxdrop_lightning.layers.lazy_tensor import (
    as_dense,
    backward_passes,
    note_backward,
    run_eagerly,
    shape_of,
)
from approxdrop_lightning.layers.linear import Pending, PendingLinear, read_whole_before
from approxdrop_lightning.ops.derivative import batch_of_transforms, is_transformed, outside_of_transforms
from approxdrop_lightning.patterns.joined import join, of_as_many_orders
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.sampler import PatternSampler
from approxdrop_lightning.patterns.tile import BernoulliPattern, TilePattern
from approxdrop_lightning.policy import Policy, thresholds

Pattern = RowPattern | TilePattern | BernoulliPattern | Drawn

#: Patterns that a site holds at most, and backward passes of one step at which it says that there are too many.
_MOST_HELD = 1024
_MANY_PASSES = 100
_WARNED: weakref.WeakSet[PatternSampler] = weakref.WeakSet()

#: Functions as a reader of the report knows them: what follows a linear layer is normalised in one dimension.
_MODULES = {
    "batch_norm": "BatchNorm1d",
    "instance_norm": "InstanceNorm1d",
    "layer_norm": "LayerNorm",
    "group_norm": "GroupNorm",
    "rms_norm": "RMSNorm",
}


class Site:
    """One dropout: its rate, its patterns, and what it was seen to stand between.

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
        #: Whether it ran eagerly because no more graphs could be compiled.
        self.beyond_limit = False
        #: Patterns of compiled graphs.
        self.book: weakref.ref[Book] | None = None
        self.steps = 0
        self._patterns: list[Any] = []
        self._uses = self._forgotten = 0
        self._passes_before = backward_passes()

    @property
    def last_patterns(self) -> tuple[Pattern, ...]:
        """Patterns of the last training forward, in order of use."""
        eager, book = (
            tuple(self._patterns[: self._uses - self._forgotten]),
            None if self.book is None else self.book(),
        )
        return eager if eager or book is None else book.drawn(self)

    @property
    def scale(self) -> float:
        """Factor of the kept values in this step."""
        if self.scale_by == "dp":
            return self.sampler.dp / self.sampler.keep
        return 1 / (1 - self.rate)

    @property
    def drew_on_host(self) -> bool:
        """Whether an eager layer has used a pattern since the step began."""
        return self._uses > 0

    def begin(self, fresh: bool = True) -> None:
        """Begin a forward pass: with fresh patterns, or with those of the last one again."""
        if fresh or self._forgotten:
            self._patterns.clear()
        self._uses = self._forgotten = 0
        self._passes_before = backward_passes()
        self.steps += 1

    @property
    def skips(self) -> list[str]:
        """What is skipped, as far as it was seen."""
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

    def _too_narrow(self, pattern: RowPattern, device: torch.device, dtype: torch.dtype) -> str | None:
        reason = self.policy.units(pattern.n, device, dtype)
        if reason is None and pattern.overlaps and pattern.n_orders > 1:
            return self.policy.blocks(pattern.n, pattern.block_size, device, dtype)
        return reason

    def saves_too_few(self, multiplies: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a product of so many multiplies is too small to gain by the dropout; then the report says so."""
        self.overhead = thresholds(device, dtype).saved
        return self._refuses(self.policy.product(int(multiplies * self.rate), device, dtype))

    def saves_too_few_in_lstm(self, multiplies: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Likewise of a product of an LSTM."""
        return self._refuses(self.policy.lstm(int(multiplies * self.rate), device, dtype))

    def _refuses(self, reason: str | None) -> bool:
        if reason is not None and self.too_small is None:
            self.too_small = reason
        return reason is not None

    def shares(self, multiplies: int) -> list[tuple[Site, int]]:
        """Sites that so many multiplies of a product fall to: this one."""
        return [(self, multiplies)]

    def pattern(
        self, n: int, shared: bool = False, leading_shape: tuple[int, ...] = (), widths: tuple[int, ...] = ()
    ) -> RowPattern:
        """The pattern of the next use.

        Args:
            n: Number of units.
            shared: Whether it is one for all rows of the batch.
            leading_shape: Shape of the batch.
            widths: Units of each tensor of which ``n`` are the concatenation, if each is to have its own pattern.
        """

        def draw() -> RowPattern:
            if widths and self.sampler.keep < self.sampler.dp:
                drawn = [self.sampler.pattern(width, shared, leading_shape) for width in widths]
                found = join(of_as_many_orders(drawn))
                if found is not None:
                    return found
            return self.sampler.pattern(n, shared, leading_shape)

        return self._next(draw, lambda pattern: pattern.n == n)

    def _next(self, draw: Callable[[], Any], fits: Callable[[Any], bool]) -> Any:
        """What is drawn for the next use: anew, or again if the step is one and it still fits."""
        if torch._C._current_graph_task_id() != -1:  # within a backward pass: activations are computed again
            if self._uses != 1:
                raise RuntimeError(
                    f"{self.name}: activation checkpointing recomputes a dropout that was used {self._uses} times in "
                    "this forward; which pattern is meant cannot be told"
                )
            return self._patterns[0]
        place = self._uses - self._forgotten
        if place == len(self._patterns) or not fits(self._patterns[place]):
            del self._patterns[place:]
            self._check_resampled()
            if place == _MOST_HELD:
                del self._patterns[: place // 2]
                self._forgotten += place // 2
            self._patterns.append(draw())
        self._uses += 1
        return self._patterns[self._uses - self._forgotten - 1]

    def _check_resampled(self) -> None:
        """Warn once if steps go by and nobody says so."""
        passes = backward_passes() - self._passes_before
        if passes >= _MANY_PASSES and self.sampler not in _WARNED:
            _WARNED.add(self.sampler)
            warnings.warn(
                f"{self.name}: {passes} backward passes since resample(model) was last called, all with "
                f"(dp, keep) = ({self.sampler.dp}, {self.sampler.keep}); call it before each training step",
                stacklevel=2,
            )

    def read_kept(self, name: str) -> None:
        """A layer of that name reads kept units only."""
        self.consumers.add(name)

    def read_whole(self, name: str) -> None:
        """A function of that name reads everything, zeros too."""
        self.dense_readers.add(name)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of ``x`` (``[..., n]``) by the next pattern; what it drops of a pending product is not computed."""
        shape = shape_of(x)
        if not shape or 0 in shape:
            return as_dense(x) * self.scale
        if is_transformed():
            return self._under_transforms(as_dense(x))
        source = x if isinstance(x, (PendingLinear, PendingCombination)) and x.is_lazy else None
        pending: Pending | Combination | None = None if source is None else source.held
        kind = (x.device, x.dtype) if pending is None else (pending.device, pending.dtype)
        widths = pending.widths if isinstance(pending, Combination) else ()
        if widths and self.policy.units(min(widths), *kind) is not None:
            widths = ()
        pattern = self.pattern(shape[-1], leading_shape=shape[:-1], widths=widths)
        for layer in () if pending is None else pending.layers:
            layer.dropped_by.add(self)
        if pattern.keeps_all:
            return as_dense(x) * self.scale
        if too_narrow := self._too_narrow(pattern, *kind):
            self.too_small = too_narrow
            x = as_dense(x)
            y = x * pattern.mask(*shape[:-1], dtype=x.dtype, value=self.scale, device=x.device)
            if self.steps < 2 and y.requires_grad:  # has resample been forgotten? Later it has not.
                y.register_hook(note_backward)
            return y
        if pending is not None and self.saves_too_few(pending.multiplies, *kind):
            pending = None
        if pending is None:  # a mask or packed, as its readers wish
            x = as_dense(x)
            if self.steps <= 1 and not self.producers:
                self.whole.update((name, _MODULES.get(by, by)) for name, by in read_whole_before(x).items())
            return CompactTensor(Kept(shape, pattern, shape[:-1], self, x, packed=False, scale=self.scale))
        self.producers.update(layer.name for layer in pending.layers)
        held = Kept(shape, pattern, shape[:-1], self, pending.kept_values(pattern, self), scale=self.scale)
        return CompactTensor(held, source=source)

    def _under_transforms(self, x: Tensor) -> Tensor:
        """Dropout by a mask: transforms of ``torch.func`` see nothing else."""
        batch, of_the_level = batch_of_transforms()
        leading = (*batch, *x.shape[:-1])
        with outside_of_transforms():
            pattern = self.pattern(x.shape[-1], leading_shape=leading)
            mask = pattern.mask(*leading, dtype=x.dtype, value=self.scale, device=x.device)
        return x * of_the_level(mask)


class ApproxDropoutSite(Converted, nn.Dropout):
    """Stands in ``nn.Dropout``'s place; in evaluation it is ``nn.Dropout``.

    Attributes:
        site: The site.
    """

    stock = nn.Dropout
    site: Site
    #: What compiled graphs read of it (:mod:`approxdrop_lightning.graph`); no key: it runs eagerly.
    graph_key: str | None = None
    graph_table: Tensor
    graph_dp: int
    graph_keep: int

    @property
    def last_patterns(self) -> tuple[Pattern, ...]:
        """Patterns of the last training forward, in order of use."""
        return self.site.last_patterns

    @property
    def scale(self) -> float:
        """Factor of the kept values in this step."""
        return self.site.scale

    @never_alone
    def forward(self, input: Tensor) -> Tensor:
        """``[..., n]`` to ``[..., n]``."""
        # Both are constants to Dynamo; so are the pair and the key, by which each pair has a graph of its own.
        # A layer that evaluates is of the stock class: no need to read `training`, a property, which PyTorch 2.11
        # cannot trace.
        if torch.compiler.is_dynamo_compiling() and self.graph_key is not None:
            return torch.ops.approxdrop.drop(input, self.graph_table, self.graph_key, self.graph_dp, self.graph_keep)
        if self.graph_key is not None and limit.is_reached() and self.drops:
            limit.warn(self.site)
        return self._run(input)

    @run_eagerly
    def _run(self, input: Tensor) -> Tensor:
        if not (self.training and self.drops):
            return super().forward(input)
        dropped = self.site.drop(input)
        if isinstance(dropped, CompactTensor) and not torch.is_grad_enabled():
            # Training mode without gradients: nothing waits, so the product exists already.
            return as_dense(dropped)
        return dropped
