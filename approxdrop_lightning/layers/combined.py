"""Lazy tensors side by side (``torch.cat``) and added up, which stay lazy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from approxdrop_lightning import functional
from approxdrop_lightning.layers.compact_tensor import Combine, CompactTensor
from approxdrop_lightning.layers.contexts import Autocast
from approxdrop_lightning.layers.functions import Chain, run_chain, tensors_of, with_tensors
from approxdrop_lightning.layers.kept import Kept, Seen
from approxdrop_lightning.layers.lazy_tensor import COMBINATIONS, LazyTensor, is_pointwise, shape_of
from approxdrop_lightning.layers.pending import PendingLinear, dense_again
from approxdrop_lightning.layers.use import Use
from approxdrop_lightning.layers.waiting import settle
from approxdrop_lightning.ops.derivative import vjp
from approxdrop_lightning.ops.row_linear import joined
from approxdrop_lightning.patterns.joined import JoinedPattern, join
from approxdrop_lightning.patterns.row import RowPattern

if TYPE_CHECKING:
    from approxdrop_lightning.layers.site import Site

_CATS = tuple(getattr(torch, name) for name in ("cat", "concat", "concatenate"))
_ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


class Combination:
    """What a :class:`PendingCombination` holds.

    Args:
        parts: Pending outputs, and ordinary tensors beside them.
        adds: Whether they are added up; else they are side by side in the last dimension.
    """

    def __init__(self, parts: tuple[Tensor, ...], adds: bool) -> None:
        self.parts, self.adds = parts, adds
        *rows, n = shape_of(parts[0])
        #: Units of each part, if they are side by side.
        self.widths = () if adds else tuple(shape_of(part)[-1] for part in parts)
        self.shape = (*rows, n if adds else sum(self.widths))
        #: Elementwise functions put down so far, as ``(function, arguments, keywords)``, and of these the newest one.
        self.chain: Chain = ()
        self.own: Chain = ()
        self.pending = [part for part in parts if isinstance(part, PendingLinear)]
        first = self.pending[0].held
        self.dtype, self.device, self.backend = first.dtype, first.device, first.backend
        self.autocast: Autocast = first.autocast
        self._versions = self._tensor_versions()

    def _tensor_versions(self) -> list[int]:
        plain = [part for part in self.parts if not isinstance(part, LazyTensor)]
        return [tensor._version for tensor in (*plain, *tensors_of(self.chain))]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers whose outputs it is made of."""
        return tuple(part.held.name for part in self.pending)

    @property
    def multiplies(self) -> int:
        """Of their dense products."""
        return sum(part.held.multiplies for part in self.pending)

    may_change = True

    @property
    def has_changed(self) -> bool:
        return self._versions != self._tensor_versions() or any(part.held.has_changed for part in self.pending)

    def followed_by(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Combination | None:
        """With one more function at the end of the chain; None if it is called in another autocast."""
        if not self.autocast.is_current:
            return None
        other = object.__new__(Combination)
        function = (func, args, kwargs)
        vars(other).update(vars(self), chain=(*self.chain, function), own=(function,))
        if self.autocast.enabled:  # which takes some functions to float32
            other.dtype = func(torch.empty(0, dtype=self.dtype, device=self.device), *args, **kwargs).dtype
        other._versions = [*self._versions, *(t._version for t in tensors_of(other.own))]
        return other

    def _check(self) -> None:
        if self.has_changed:
            names = ", ".join(self.names)
            raise RuntimeError(
                f"{names}: what was made of their outputs is read for the first time after something that it is made "
                "of was changed in place; read it before that"
            )

    def compute(self) -> Tensor:
        self._check()
        with self.autocast.context():
            parts = [
                part.held.compute() if isinstance(part, LazyTensor) and part.is_lazy else _as_made(part)
                for part in self.parts
            ]
            return run_chain(self.chain, _combined(parts, self.adds))

    def dropped(self, pattern: RowPattern, use: Use, scale: float, source: LazyTensor) -> CompactTensor:
        """The dropped-out tensor of a site's pattern: the units that it drops are not computed."""
        values = self.kept_values(pattern, use)
        return CompactTensor.kept_of(source, values, (pattern, self.shape[:-1], self.shape), use, scale)

    def kept_values(self, pattern: RowPattern, use: Use) -> Tensor:
        """Values of the units that a site's pattern keeps, packed; of pending outputs the others are not computed."""
        self._check()
        rows = self.shape[:-1]
        with self.autocast.context():
            if self.adds:
                values = [self._kept(part, pattern, use) for part in self.parts]
                return run_chain(self.chain, sum(values[1:], values[0]))
            if isinstance(pattern, JoinedPattern) and tuple(piece.n for piece in pattern.pieces) == self.widths:
                pieces = zip(self.parts, pattern.pieces, strict=True)
                values = [self._kept(part, piece, use) for part, piece in pieces]
                return run_chain(self.chain, joined.cat(tuple(values), pattern, rows))
            return functional.pack(self.compute(), pattern, self.backend)

    def _kept(self, part: Tensor, pattern: RowPattern, use: Use) -> Tensor:
        if isinstance(part, PendingLinear) and part.is_lazy:
            part.place.use()
            return part.held.kept_values(pattern, use)
        return functional.pack(_as_made(part), pattern, self.backend)


def _as_made(part: Tensor) -> Tensor:
    return part.as_made() if isinstance(part, LazyTensor) else part


def _combined(parts: Sequence[Tensor], adds: bool) -> Tensor:
    """Dense parts added up or side by side."""
    return sum(parts[1:], parts[0]) if adds else torch.cat(tuple(parts), dim=-1)


class _Follow(torch.autograd.Function):
    """A function of a combination in the graph: of that one and the tensors that the function has.

    It holds none of the pending outputs: whoever holds one is taken to want its value.
    """

    @staticmethod
    def forward(ctx: Any, cls: type, held: Combination, above: PendingCombination, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.autocast, ctx.before, ctx.own, ctx.adds = held.autocast, above.held.chain, held.own, held.adds
        ctx.recipes = [part.held.recipe if isinstance(part, PendingLinear) else None for part in held.parts]
        ctx.save_for_backward(*tensors, *(part for part in held.parts if not isinstance(part, PendingLinear)))
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        settle()
        wanted = ctx.needs_input_grad[2:]
        if grad is None:
            return None, None, *[None] * len(wanted)
        tensors, plain = ctx.saved_tensors[: len(wanted) - 1], iter(ctx.saved_tensors[len(wanted) - 1 :])

        def function(y: Tensor, *tensors: Tensor) -> Tensor:
            with ctx.autocast.context():
                return run_chain(with_tensors(ctx.own, tensors), y)

        with ctx.autocast.context():
            parts = [next(plain) if recipe is None else dense_again(*recipe) for recipe in ctx.recipes]
            above = run_chain(ctx.before, _combined(parts, ctx.adds))
        return None, None, *vjp(function, (above, *tensors), wanted, grad)


class PendingCombination(LazyTensor):
    """Pending outputs side by side, or their sum, which nobody has read yet."""

    held: Combination

    @staticmethod
    def __new__(cls, held: Combination, made_of: LazyTensor | None = None) -> PendingCombination:
        if made_of is None:
            return Combine.apply(cls, held, held.adds, *held.parts)
        return _Follow.apply(cls, held, made_of, *tensors_of(held.own))

    def __init__(self, held: Combination, made_of: LazyTensor | None = None) -> None:
        super().__init__(held, made_of=made_of)
        if made_of is None:
            stand_below(self, held.pending)

    def _dense_from_above(self) -> Tensor:
        place = self.place.above
        above = None if place is None else place.tensor
        with self.held.autocast.context():
            if isinstance(above, PendingCombination):
                return run_chain(self.held.own, above.dense())
            parts = [_as_made(part) for part in self.held.parts]
            return run_chain(self.held.chain, _combined(parts, self.held.adds))

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_pointwise(func, args, kwargs) and not kwargs.get("inplace", False):
            longer = self.held.followed_by(func, args, kwargs)
            if longer is not None:
                self.place.extended = True
                return PendingCombination(longer, made_of=self)
        return NotImplemented

    def _read_by(self, name: str) -> None:
        for part in self.held.pending:
            part._read_by(name)


class _SideBySide:
    """Uses of several sites whose outputs are side by side."""

    def __init__(self, tensors: Sequence[CompactTensor]) -> None:
        self._uses: list[Seen] = [tensor.held.use for tensor in tensors]
        self._widths = [tensor.held.shape[-1] for tensor in tensors]
        self.name, self.backend = ", ".join(dict.fromkeys(use.name for use in self._uses)), self._uses[0].backend
        self.ask = self._uses[0].ask
        for use in self.parts:
            use.put_beside(self.parts)

    @property
    def parts(self) -> list[Use]:
        """Uses of single sites."""
        return [part for use in self._uses for part in use.parts]

    @property
    def steps(self) -> int:
        return min(use.steps for use in self._uses)

    def _shared(self, multiplies: int) -> list[tuple[Seen, int]]:
        total = sum(self._widths)
        return [(use, multiplies * width // total) for use, width in zip(self._uses, self._widths, strict=True)]

    def read_kept(self, name: str, multiplies: int) -> None:
        for use, share in self._shared(multiplies):
            use.read_kept(name, share)

    def read_whole(self, name: str) -> None:
        for use in self._uses:
            use.read_whole(name)

    def saves_too_few(self, multiplies: int) -> bool:
        return self._uses[0].saves_too_few(multiplies)

    def saves_too_few_in_lstm(self, multiplies: int) -> bool:
        return self._uses[0].saves_too_few_in_lstm(multiplies)

    def shares(self, multiplies: int) -> list[tuple[Site, int]]:
        return [found for use, share in self._shared(multiplies) for found in use.shares(share)]


def stand_below(tensor: LazyTensor, parts: Sequence[LazyTensor]) -> None:
    """Note of which lazy tensors one was made."""
    tensor.place.above, *beside = (part.place for part in parts)
    tensor.place.beside = tuple(beside)
    for part in parts:
        part.place.extended = True


def _cat(tensors: Any, dim: Any = 0, *args: Any, **kwargs: Any) -> Any:
    """``torch.cat`` of lazy tensors in the last dimension, and of ordinary ones among pending outputs."""
    parts = tuple(tensors) if isinstance(tensors, (tuple, list)) else ()
    if args or kwargs or len(parts) < 2 or not isinstance(dim, int) or not all(isinstance(p, Tensor) for p in parts):
        return NotImplemented
    shapes = [shape_of(part) for part in parts]
    last = len(shapes[0]) - 1
    if dim not in (-1, last) or last < 1 or any(shape[:-1] != shapes[0][:-1] or 0 in shape for shape in shapes):
        return NotImplemented
    if all(isinstance(part, CompactTensor) and part._acts for part in parts):
        return _cat_of_dropped(parts)
    return _combination(parts, adds=False)


def _add(x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
    """Sum of two pending outputs."""
    lazy = all(isinstance(part, (PendingLinear, PendingCombination)) for part in (x, y))
    if args or kwargs or not lazy or shape_of(x) != shape_of(y):
        return NotImplemented
    terms = [t for part in (x, y) for t in (_terms(part) if isinstance(part, PendingCombination) else [part])]
    return _combination(tuple(terms), adds=True)


def _terms(tensor: PendingCombination) -> Sequence[Tensor]:
    """What a sum consists of, if nothing has been done to it and nobody has read it."""
    held = tensor.held
    return held.parts if held.adds and not held.chain and tensor._acts and not tensor.place.extended else [tensor]


def _combination(parts: tuple[Tensor, ...], adds: bool) -> Any:
    pending = [part for part in parts if isinstance(part, PendingLinear) and part._acts]
    if not pending:
        return NotImplemented
    # What has been read already is an ordinary tensor; dropped-out ones have a pattern of their own.
    parts = tuple(part if any(part is p for p in pending) else _plain(part) for part in parts)
    others = [part for part in parts if not isinstance(part, PendingLinear)]
    if any(isinstance(part, LazyTensor) for part in others):
        return NotImplemented
    first = pending[0].held
    kinds = {(part.held.dtype, part.held.device) for part in pending} | {(part.dtype, part.device) for part in others}
    if len(kinds) > 1 or not all(part.held.autocast.is_current for part in pending):
        return NotImplemented
    if not first.dtype.is_floating_point or math.prod(first.shape) == 0:
        return NotImplemented
    return PendingCombination(Combination(parts, adds))


def _plain(part: Tensor) -> Tensor:
    return part.dense() if isinstance(part, LazyTensor) and not part.is_lazy else part


def _cat_of_dropped(parts: tuple[Any, ...]) -> Any:
    """Dropped-out tensors side by side: one of a joined pattern."""
    helds: list[Kept] = [part.held for part in parts]
    first = helds[0]
    packed = first.has_values
    if any(h.has_values != packed or h.rows != first.rows or h.shape[:-1] != h.rows for h in helds):
        return NotImplemented
    if any((h.dtype, h.device) != (first.dtype, first.device) for h in helds):
        return NotImplemented
    if not packed and any(h.scale != first.scale or h.has_changed for h in helds):
        return NotImplemented
    pattern = join([h.pattern for h in helds])
    if pattern is None:
        return NotImplemented
    if packed:
        given = joined.cat(tuple(h.values for h in helds), pattern, first.rows)
    else:
        given = torch.cat([h.given.view(h.shape) for h in helds], dim=-1)
    held = Kept(
        (*first.rows, pattern.n),
        pattern,
        first.rows,
        _SideBySide(parts),
        given,
        packed,
        1.0 if packed else first.scale,
    )
    for part in parts:
        part.place.use()
    whole = CompactTensor(held, parts=parts)
    stand_below(whole, parts)
    return whole


COMBINATIONS.update(dict.fromkeys(_CATS, _cat) | dict.fromkeys(_ADDS, _add))
