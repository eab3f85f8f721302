"""Row patterns: the units of a layer that each row of a batch keeps."""

from __future__ import annotations

import ctypes
import math
import operator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from approxdrop_lightning.device import to_device
from approxdrop_lightning.patterns.cells import Cells, PatternStruct, kept_counts, natural_cells, sort_by_cell
from approxdrop_lightning.patterns.units import Units, UnitsStruct

#: Patterns are built on the CPU, regardless of the default device.
HOST = torch.device("cpu")


def check_integers(pattern: object, **ranges: int | tuple[int, float]) -> None:
    """Check that attributes of a pattern are integers in inclusive ranges, given as ``low`` or ``(low, high)``.

    Raises:
        ValueError: One of them is not.
    """
    for name, allowed in ranges.items():
        low, high = allowed if isinstance(allowed, tuple) else (allowed, math.inf)
        value = getattr(pattern, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            kind = type(pattern).__name__
            raise ValueError(f"{kind}: {name} must be an integer in [{low}, {high}], got {value!r}")


@dataclass(frozen=True, eq=False)
class RowPattern:
    """Row-based dropout pattern of ``n`` units (Song et al., DATE 2019, section 3.1, and beyond).

    The units are divided into ``dp`` cells, ``keep`` of which are kept. Unit ``j`` lies in the cell ``c(j) = order[j
    // block_size] mod dp`` (natural order: ``c(j) = j // block_size mod dp``). Group ``g`` keeps the cells ``(offset
    + g * shift + i) mod dp`` for ``i < keep``. A shared pattern has a single group, 0. In an interleaved pattern, the
    row of a batch with leading indices ``(t, b, ...)`` belongs to group ``(t + b + ...) mod n_groups``, and groups
    differ as much as possible: if at most half of the cells are kept, the kept sets are disjoint (``dp // keep``
    groups, ``shift = keep``; one per cell if ``keep = 1``); otherwise the dropped sets are (2 groups, ``shift = dp -
    keep``). There are no more groups than that, because the products of larger groups are faster.

    The rows of a large batch may also alternate between several orders of the units, which multiplies the number of
    groups (the groups of one order follow those of another): more distinct masks in a batch make its gradient less
    noisy.

    Because ``offset`` is uniform over ``dp`` values, every unit is kept with probability exactly
    ``keep / dp``, even if ``dp`` does not divide ``n``.

    Attributes:
        n: Number of units, >= 1.
        dp: Period, number of cells, >= 1. Some cells are empty if ``dp`` exceeds the number of blocks.
        offset: First kept cell of group 0, in [0, dp).
        keep: Number of kept cells, in [1, dp].
        interleave: Whether the rows of a batch alternate between the cells.
        order: Permutation of the ``ceil(n / block_size)`` blocks (int64 tensor or sequence), or, if the pattern is
            interleaved, several permutations as the rows of a matrix; None for the natural order.
        block_size: Units per block, >= 1. The last block may be smaller.

    Raises:
        ValueError: An argument is out of range.
    """

    n: int
    dp: int
    offset: int
    keep: int = 1
    interleave: bool = False
    order: Tensor | None = None
    block_size: int = 1

    def __post_init__(self) -> None:
        check_integers(self, n=1, dp=1, block_size=1)
        check_integers(self, offset=(0, self.dp - 1), keep=(1, self.dp))
        if self.order is not None:
            order = torch.as_tensor(self.order, dtype=torch.int64, device="cpu")
            rows = order.view(-1, self.n_blocks) if order.shape[-1:] == (self.n_blocks,) else order.new_empty(0)
            natural = torch.arange(self.n_blocks, device="cpu").expand_as(rows) if len(rows) else None
            if order.dim() > 2 or natural is None or not torch.equal(rows.sort().values, natural):
                raise ValueError(f"RowPattern: order must be a permutation of {self.n_blocks} blocks, got {order}")
            if len(rows) > 1 and not self.interleave:
                raise ValueError(f"RowPattern: {len(rows)} orders need interleave=True")
            object.__setattr__(self, "order", (rows[0] if len(rows) == 1 else rows).contiguous())

    @classmethod
    def unchecked(
        cls, n: int, dp: int, offset: int, keep: int, interleave: bool, order: Tensor | None, block_size: int
    ) -> RowPattern:
        """Skip the validation, which takes longer than drawing a pattern.

        The caller guarantees the attributes, and that ``order`` is contiguous.
        """
        pattern = object.__new__(cls)
        vars(pattern).update(
            n=n, dp=dp, offset=offset, keep=keep, interleave=interleave, order=order, block_size=block_size
        )
        return pattern

    def reordered(self, order: Tensor) -> RowPattern:
        """The same pattern with other orders of the units, which are not validated either."""
        return RowPattern.unchecked(self.n, self.dp, self.offset, self.keep, self.interleave, order, self.block_size)

    def __getstate__(self) -> dict[str, object]:
        # Without the cached attributes: addresses belong to this object's memory.
        return {field.name: vars(self)[field.name] for field in fields(self)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowPattern) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @cached_property
    def _key(self) -> tuple[object, ...]:
        order = None if self.order is None else (*self.order.shape, *self.order.flatten().tolist())
        return (self.n, self.dp, self.offset, self.keep, self.interleave, order, self.block_size)

    @property
    def n_blocks(self) -> int:
        """Number of blocks of units, the last of which may be smaller."""
        return -(-self.n // self.block_size)

    @cached_property
    def n_groups(self) -> int:
        """Number of groups of rows, 1 for a shared pattern."""
        if not self.interleave or self.keeps_all:
            return 1
        return self.n_orders * (2 if self.overlaps else self.dp // self.keep)

    @cached_property
    def n_orders(self) -> int:
        """Number of orders of the units that the rows alternate between."""
        return 1 if self.keeps_all or self.order is None or self.order.dim() == 1 else len(self.order)

    @property
    def overlaps(self) -> bool:
        """Whether the kept units of different groups overlap."""
        return self.interleave and 2 * self.keep > self.dp and not self.keeps_all

    @property
    def _shift(self) -> int:
        return _shift(self.dp, self.keep)

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is dropped."""
        return self.keep == self.dp

    def units(self, group: int) -> Units:
        """The units that a group keeps, cell by cell; in ascending order for a shared pattern."""
        return self._units[group]

    @cached_property
    def _units(self) -> tuple[Units, ...]:
        groups = self.n_groups // self.n_orders
        first = [g * self._shift for g in range(groups)]
        units = tuple(self._cells.between(o, f, f + self.keep) for o in range(self.n_orders) for f in first)
        if self._is_by_cell:
            return units
        starts, order = units[0].starts.sort()
        return (Units(starts, units[0].lengths[order], units[0].count),)

    #: Whether consecutive positions of an order are in consecutive cells.
    _in_turn: ClassVar[bool] = True

    @property
    def _is_by_cell(self) -> bool:
        """Whether the units of a group come cell by cell: those of several cells do not ascend then."""
        return self.interleave or self.keep == 1

    @cached_property
    def _cells(self) -> Cells:
        if self.order is None:
            return natural_cells(self.n, self.dp, self.offset, self.block_size)
        cells = (self._orders.numpy() - self.offset) % self.dp
        return sort_by_cell(self.n, cells, self.dp, self.block_size)

    @cached_property
    def address(self) -> int:
        """Address of the pattern in the form that compiled code reads; valid as long as this object is alive."""
        n_orders = self.n_orders
        order = None if self.order is None else self.order.data_ptr()
        sizes = self.n, self.block_size, self.dp, self.offset, self.keep, self._shift
        struct = PatternStruct(*sizes, self.n_groups // n_orders, n_orders, not self._is_by_cell, order)
        vars(self)["_struct"] = struct
        return ctypes.addressof(struct)

    @property
    def _orders(self) -> Tensor:
        order = torch.arange(self.n_blocks, device="cpu") if self.order is None else self.order
        return order.view(-1, self.n_blocks)[: self.n_orders]

    def cells(self) -> tuple[Tensor, ...]:
        """Kept indices of each group: ``n_groups`` int64 tensors.

        Ascending within each cell; the cells of a group follow each other, starting with the first kept one. For a
        shared pattern, all indices ascend.
        """
        return tuple(units.index for units in self._units)

    @property
    def kept(self) -> Tensor:
        """Kept indices of group 0, int64; for a shared pattern, those of every row."""
        return self._units[0].index

    @property
    def n_kept(self) -> int:
        """Number of units that group 0 keeps."""
        return self.counts[0]

    @cached_property
    def counts(self) -> list[int]:
        """Number of units that each group keeps."""
        groups, shift = self.n_groups // self.n_orders, self._shift
        if self.n % self.block_size == 0 and self._in_turn:
            blocks = kept_counts(self.n_blocks, self.dp, self.offset, self.keep, shift, groups)
            return [count * self.block_size for count in blocks] * self.n_orders
        first = [g * shift for g in range(groups)]
        return [units[f + self.keep] - units[f] for units in self._cells.first_unit for f in first]

    def n_packed(self, leading_shape: tuple[int, ...]) -> int:
        """Number of values that are kept of a batch."""
        return sum(map(operator.mul, row_counts(leading_shape, self.n_groups), self.counts))

    def units_by_cell(self, group: int) -> list[int]:
        """Number of units in each of a group's kept cells, in the order of :meth:`units`."""
        order, group = divmod(group, self.n_groups // self.n_orders)
        units, first = self._cells.first_unit[order], group * self._shift
        return [units[cell + 1] - units[cell] for cell in range(first, first + self.keep)]

    @property
    def share(self) -> float:
        """Share of the units kept, averaged over the groups."""
        if self.keeps_all:
            return 1.0
        n_blocks, orders = self.n_blocks, self.n_orders
        blocks, times = _times_kept(n_blocks, self.dp, self.offset, self.keep, self.n_groups // orders)
        kept = orders * blocks * self.block_size
        if missing := n_blocks * self.block_size - self.n:  # the last block is shorter
            last = [n_blocks - 1]
            if self.order is not None:  # reading single entries is many times faster in NumPy
                last = self.order.numpy().reshape(orders, n_blocks)[:, -1].tolist()
            kept -= missing * sum(times[place] for place in last)
        return kept / (self.n_groups * self.n)

    def row_groups(self, leading_shape: tuple[int, ...]) -> tuple[Units, ...]:
        """Rows of each group, as ascending indices into the flattened leading dimensions."""
        return row_groups(tuple(leading_shape), self.n_groups)

    def row_order(self, leading_shape: tuple[int, ...]) -> Tensor:
        """Rows of all groups, group after group, int64."""
        return _row_order(tuple(leading_shape), self.n_groups)

    def flat_index(self, leading_shape: tuple[int, ...]) -> Tensor:
        """Flat indices of the packed values in a contiguous ``[*leading_shape, n]``, int64, group after group."""
        if (known := self._flat_indices.get(leading_shape)) is not None:
            return known
        rows = self.row_groups(leading_shape)
        index = torch.cat([(r.index[:, None] * self.n + c).view(-1) for r, c in zip(rows, self.cells(), strict=True)])
        self._flat_indices.clear()  # a pattern rarely sees batches of different shapes
        self._flat_indices[leading_shape] = index
        return index

    @cached_property
    def _flat_indices(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def mask(
        self,
        *leading_shape: int,
        dtype: torch.dtype = torch.bool,
        value: float = 1,
        device: torch.device = HOST,
    ) -> Tensor:
        """``[*leading_shape, n]``: ``value`` where an entry of the batch is kept, zero elsewhere."""
        n_blocks, orders = self.n_blocks, self.n_orders
        groups = self.n_groups // orders
        kept = _kept_places(n_blocks, self.dp, self.offset, self.keep, groups, dtype, value)
        if self.order is not None:
            kept = kept.index_select(1, self.order.view(-1)[: orders * n_blocks])
            if orders > 1:
                kept = kept.view(groups, orders, n_blocks).transpose(0, 1).reshape(-1, n_blocks)
        kept = to_device(kept, device)
        if self.block_size > 1:
            kept = kept[:, :, None].expand(-1, -1, self.block_size).reshape(self.n_groups, -1)[:, : self.n]
        group = _group_of_row(tuple(leading_shape), self.n_groups, device)
        return kept.index_select(0, group.view(-1)).view(*leading_shape, self.n)


def _shift(dp: int, keep: int) -> int:
    """Distance in cells between the first kept cells of consecutive groups."""
    return dp - keep if 2 * keep > dp else keep


@lru_cache(maxsize=1024)
def _times_kept(n_blocks: int, dp: int, offset: int, keep: int, n_groups: int) -> tuple[int, list[int]]:
    """Total number of blocks that the groups of one order keep, and the number of groups that keep each position."""
    times = _kept_places(n_blocks, dp, offset, keep, n_groups, torch.bool, 1).sum(0).tolist()
    return sum(times), times


@lru_cache(maxsize=1024)
def _kept_places(
    n_blocks: int, dp: int, offset: int, keep: int, n_groups: int, dtype: torch.dtype, value: float
) -> Tensor:
    """``[n_groups, n_blocks]``: ``value`` where a group keeps the block at a position of the order, else zero."""
    first = offset + _shift(dp, keep) * torch.arange(n_groups, device="cpu")[:, None]
    kept = (torch.arange(n_blocks, device="cpu") - first).remainder(dp) < keep
    return kept if dtype == torch.bool else kept.to(dtype) * value


@lru_cache(maxsize=256)
def _group_of_row(leading_shape: tuple[int, ...], n_groups: int, device: torch.device = HOST) -> Tensor:
    group = torch.zeros(leading_shape, dtype=torch.int64, device=device)
    for dim, size in enumerate(leading_shape):
        group += torch.arange(size, device=device).view(-1, *[1] * (len(leading_shape) - dim - 1))
    return group.remainder(n_groups)


@lru_cache(maxsize=256)
def row_groups(leading_shape: tuple[int, ...], n_groups: int) -> tuple[Units, ...]:
    """Rows of each of so many groups; see :meth:`RowPattern.row_groups`."""
    if n_groups == 1:
        return (Units.every(math.prod(leading_shape)),)
    group = _group_of_row(leading_shape, n_groups).view(-1)
    rows = [(group == g).nonzero().squeeze(1) for g in range(n_groups)]
    return tuple(Units(r, torch.ones_like(r), len(r)) for r in rows)


@lru_cache(maxsize=256)
def row_counts(leading_shape: tuple[int, ...], n_groups: int) -> list[int]:
    """Number of rows in each of so many groups."""
    return [rows.count for rows in row_groups(leading_shape, n_groups)]


@lru_cache(maxsize=256)
def row_structs(leading_shape: tuple[int, ...], n_groups: int) -> ctypes.Array[UnitsStruct]:
    """Rows of each group in the form that compiled code reads; see :meth:`RowPattern.row_groups`."""
    rows = row_groups(leading_shape, n_groups)
    return (UnitsStruct * n_groups)(*(units.struct for units in rows))


@lru_cache(maxsize=256)
def _row_order(leading_shape: tuple[int, ...], n_groups: int) -> Tensor:
    return torch.cat([rows.index for rows in row_groups(leading_shape, n_groups)])
