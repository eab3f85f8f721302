"""Patterns as data: one tensor for all dropouts of a model, written before each batch and read by compiled graphs.

The tensor is an input of the graph and allocated before the widths are known, so it has spare room; the pass enters
each use of a dropout as it finds it (:meth:`Book.use`). The pattern of a use depends only on the seed of the step and
on the use itself, not on which other uses were entered, or when. So a resumed run has the same patterns as one that
was not interrupted.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from approxdrop_lightning.graph.calls import Calls
from approxdrop_lightning.graph.drawing import Array, Draw
from approxdrop_lightning.graph.layout import Layout, Rows, TableUse, layout_of, mask_of, rows_of
from approxdrop_lightning.graph.pairs import Pair, Pairs
from approxdrop_lightning.patterns.sampler import PatternSampler
from approxdrop_lightning.work import Ledger

if TYPE_CHECKING:
    from approxdrop_lightning.layers.site import Site

#: Size of a new table: room for some hundred layers of 1,024 units.
_ROOM = 1 << 17

#: Numbers of the draws of all books, in the first entry of a table: what was computed from a table is valid for one.
_STAMPS = itertools.count(1)
_BOOKS: weakref.WeakValueDictionary[int, Book] = weakref.WeakValueDictionary()
_SERIAL = itertools.count()


def _no_module() -> None:
    """In place of the reference to a module, for a function call."""


@dataclass(eq=False)
class Entry:
    """A use of a dropout: its part of the table, and what it is drawn from."""

    use: TableUse
    site: Site
    pair: Pair
    device: torch.device
    rows: Rows
    key: object  # determines its patterns, with the seed of the step

    @property
    def layout(self) -> Layout:
        return self.use.layout


class _Staging:
    """Host copies of a device's table, used in turn so that no step waits for a copy that is still in flight.

    Args:
        room: Size of the table.
        device: Device of the table.
    """

    def __init__(self, room: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._buffers = [
            torch.zeros(room, dtype=torch.int64, device="cpu", pin_memory=on_gpu) for _ in range(4 if on_gpu else 1)
        ]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._copied = [torch.cuda.Event() if on_gpu else None for _ in self._buffers]
        self._turn = 0

    @property
    def values(self) -> Tensor:
        """The table of this step, as a tensor."""
        return self._buffers[self._turn]

    @property
    def array(self) -> Array:
        """The same, as an array."""
        return self._arrays[self._turn]

    def next(self) -> None:
        """Switch to the buffer of the next step."""
        self._turn = (self._turn + 1) % len(self._buffers)
        if (event := self._copied[self._turn]) is not None:
            event.synchronize()  # of a few steps ago, so it rarely blocks

    def copy(self, table: Tensor, end: int) -> None:
        """Copy its first part to the device."""
        # copy_ rather than shared memory: autograd must notice that the tensor has changed.
        table[:end].copy_(self.values[:end], non_blocking=True)
        if (event := self._copied[self._turn]) is not None:
            event.record(torch.cuda.current_stream(table.device))


@dataclass(eq=False)
class _Plan:
    """What is drawn for one device in a step with certain pairs, and the end of the last use in the table."""

    draws: list[Draw]
    end: int


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pattern of one use in one step, for reports and tests: the counterpart of :class:`.RowPattern`."""

    n: int
    use: TableUse
    rows: Rows
    table: Tensor

    @property
    def share(self) -> float:
        """Share of the units that are kept."""
        return int(self.use.active(self.table)) / self.use.layout.blocks

    def mask(self, *leading: int, dtype: torch.dtype = torch.bool, value: float = 1) -> Tensor:
        """``[*leading, n]`` of a batch: ``value`` where it is kept, zero elsewhere."""
        unscaled = self.use._replace(scale=1.0)
        mask = mask_of(unscaled, self.table, self.rows, leading, torch.float64)
        return mask.bool() if dtype == torch.bool else (mask * value).to(dtype)


class Book:
    """The patterns of one converted model, for its compiled graphs.

    Args:
        layers: The layers whose device is looked up before each batch.
        calls: Functional dropouts of the model.
    """

    def __init__(self, layers: list[nn.Module], calls: Calls) -> None:
        self.serial = next(_SERIAL)
        _BOOKS[self.serial] = self
        self._layers = [weakref.ref(layer) for layer in layers]
        self.calls = calls
        self._products: dict[str, tuple[Any, Any, int]] = {}
        #: Multiplies of the compiled products, for the report.
        self.work = Ledger()
        self.sites: list[tuple[Site, Callable[[], nn.Module | None]]] = []
        self.tables: dict[torch.device, Tensor] = {}
        self._staging: dict[torch.device, _Staging] = {}
        self._used: dict[torch.device, int] = {}
        self._plans: dict[tuple[Pair, ...], dict[torch.device, _Plan]] = {}
        self._entries: dict[tuple[Any, ...], Entry] = {}
        self._pairs: dict[int, Pairs] = {}  # by sampler
        self._too_small: set[torch.device] = set()
        #: Whether the user was warned that no more graphs are compiled.
        self.warned_of_limit = False

    @property
    def graphs(self) -> int:
        """Most graphs for one shape. All rates draw from one quantile, so their pairs add up and do not multiply."""
        drawn = {id(site.sampler) for site, module in self.sites if module is not _no_module}
        return sum(len(self._pairs[sampler].support) for sampler in drawn) or 1

    def add(self, site: Site, module: nn.Module | None) -> None:
        """Register a dropout module, or a functional dropout without one."""
        self.sites.append((site, _no_module if module is None else weakref.ref(module)))
        site.book = weakref.ref(self)  # weak: a layer that outlives its model must not keep the book alive
        if id(site.sampler) not in self._pairs:
            self._pairs[id(site.sampler)] = Pairs(site.sampler.distribution)
        if module is not None:
            weakref.finalize(self, _forget, weakref.ref(module))
            object.__setattr__(module, "graph_key", self.key(site))

    def key(self, site: Site) -> str:
        """Identifies a site in the arguments of :func:`.operator.drop`."""
        return f"{self.serial}.{self._index(site)}"

    def is_call(self, site: Site) -> bool:
        """Whether a site is a functional dropout."""
        return self.sites[self._index(site)][1] is _no_module

    def _index(self, site: Site) -> int:
        return next(i for i, (known, _) in enumerate(self.sites) if known is site)

    def begin(self) -> None:
        """Begin a step: set the pair of each site, which compiled code guards on, and fill the tables."""
        if not self.sites or all(site.is_native for site, _ in self.sites):
            return
        device = self.device
        table = self.table(device)
        pairs = self._pairs_of_step()
        for site, ref in self.sites:
            module = ref()
            # Gone, a stock layer in evaluation, or native: another pair would only cause a recompile.
            if module is None or "graph_key" not in vars(module) or site.is_native:
                continue
            dp, keep = pairs[id(site.sampler)]
            state = vars(module)  # bypasses nn.Module.__setattr__: nothing of ours may be registered or saved
            state["graph_dp"], state["graph_keep"], state["graph_table"] = dp, keep, table
        self.fill()

    @property
    def may_draw(self) -> bool:
        """Whether a graph reads the patterns of a step, as far as it is known."""
        return any(True in site.in_graphs or not (site.uses or site.in_graphs) for site, _ in self.sites)

    @property
    def device(self) -> torch.device:
        """Where the first parameter of the model is."""
        for ref in self._layers:
            if (layer := ref()) is not None:
                for parameter in layer._parameters.values():  # ten times as fast as `parameters()`, in each step
                    if parameter is not None:
                        return parameter.device
        for ref in self._layers:
            if (layer := ref()) is not None:
                for parameter in layer.parameters():  # parametrized
                    return parameter.device
        return torch.device("cpu")

    def table(self, device: torch.device) -> Tensor:
        """The tensor that compiled graphs on a device read, enlarged if a use did not fit."""
        if device in self._too_small:
            self._too_small.remove(device)
            room = 2 * len(self.tables[device])
            self._entries = {k: e for k, e in self._entries.items() if e.device != device}
            self._plans.clear()
            del self.tables[device]
        else:
            room = _ROOM
        if device not in self.tables:
            self._staging[device] = _Staging(room, device)
            # Zeros are valid places: a graph may read uses that are not entered yet.
            self.tables[device] = torch.zeros(room, dtype=torch.int64, device=device)
            self.tables[device][0] = next(_STAMPS)
            self._used[device] = 1
            torch._dynamo.mark_static_address(self.tables[device])
        return self.tables[device]

    @property
    def replay_key(self) -> tuple[Any, ...]:
        """What the compiled code of this step depends on: the pair of each rate, and the addresses of the tables."""
        pairs = tuple(self._pairs_of_step().values())
        return pairs, tuple(table.data_ptr() for table in self.tables.values())

    def pair(self, site: Site) -> Pair:
        """``(dp, keep)`` of a site in this step."""
        return self._pairs_of_step()[id(site.sampler)]

    def _pairs_of_step(self) -> dict[int, Pair]:
        """``(dp, keep)`` of this step, by sampler."""
        u = self.sites[0][0].sampler.quantile
        return {sampler: pairs.at(u) for sampler, pairs in self._pairs.items()}

    def use(
        self, site: Site, number: int, n: int, leading: tuple[int, ...], pair: Pair, device: torch.device
    ) -> Entry | None:
        """Enter a use of a site, when a graph is compiled or first run.

        Args:
            site: The site.
            number: Index among the uses of the site in the graph.
            n: Number of units.
            leading: Leading shape of the batch (current values of symbolic sizes).
            pair: ``(dp, keep)`` of the graph.
            device: Device of the graph.

        Returns:
            The entry, drawn for this step; None if the table is full, until the next step enlarges it.
        """
        sampler, (dp, keep) = site.sampler, pair
        layout = layout_of(
            n, dp, keep, interleave=sampler.interleave, block_size=sampler.block_size, shuffle=sampler.shuffle
        )
        if sampler.interleave and sampler.shuffle and layout.groups > 1:
            # The number of orders must not depend on the width, so that the groups of all layers line up.
            least = max(sampler.group_rows, site.policy.at(device, torch.get_default_dtype()).group_rows_compiled)
            orders = sampler.n_orders(layout.groups, leading, least)
            layout = layout._replace(orders=orders)
        rows_taken = rows_of(layout.all_groups, leading)
        key = (site, number, layout, rows_taken, pair, device)
        if key in self._entries:
            return self._entries[key]
        if device in self._too_small:  # until the next step: a graph reads one table only
            return None
        table, at = self.table(device), self._used[device]
        if at + layout.size > len(table):
            self._too_small.add(device)
            return None
        self._used[device] += layout.size
        scale = 1 / (1 - site.rate) if site.scale_by == "rate" else dp / keep
        # Function calls are registered as they are found, which may be in another order after a resume.
        origin = site.name if self.is_call(site) else self._index(site)
        entry = Entry(TableUse(at, scale, *layout), site, pair, device, rows_taken, (origin, number, tuple(layout)))
        self._entries[key] = entry
        self._plans.clear()
        self.calls.draw()
        Draw(sampler, pair, [entry.use], [entry.key]).write(self._staging[device].array)
        here = slice(at, at + layout.size)
        # No graph has read this part yet, so a pending backward pass must not see a changed version: hence `.data`.
        table.data[here].copy_(self._staging[device].values[here])
        return entry

    def close(self) -> None:
        """End the conversion: dropouts compile to stock dropout from now on."""
        self.calls.close()
        for _, module in self.sites:
            _forget(module)

    def fill(self) -> None:
        """Draw the tables of this step and copy them, once per device."""
        now = self._pairs_of_step()
        pairs = tuple(now.values())
        if pairs not in self._plans:
            self._plans[pairs] = self._planned(now)
        for device, plan in self._plans[pairs].items():
            staging = self._staging[device]
            staging.next()
            for draw in plan.draws:
                draw.write(staging.array)
            staging.array[0] = next(_STAMPS)
            staging.copy(self.tables[device], plan.end)

    def _planned(self, now: dict[int, Pair]) -> dict[torch.device, _Plan]:
        alike: dict[torch.device, dict[tuple[PatternSampler, Pair, Layout], list[Entry]]] = {}
        for entry in self._entries.values():
            sampler = entry.site.sampler
            if entry.pair == now[id(sampler)]:
                by_layout = alike.setdefault(entry.device, {})
                by_layout.setdefault((sampler, entry.pair, entry.layout), []).append(entry)
        plans = {}
        for device, by_layout in alike.items():
            draws = [
                Draw(sampler, pair, [e.use for e in entries], [e.key for e in entries])
                for (sampler, pair, _), entries in by_layout.items()
            ]
            end = max(e.use.at + e.layout.size for entries in by_layout.values() for e in entries)
            plans[device] = _Plan(draws, end)
        return plans

    def note(self, layer: str, before: Any, after: Any, multiplies: int) -> None:
        """Note a product of a graph for the report, between two sites, either of which may be None."""
        # Keyed by layer: the graphs of several pairs contain the same one.
        self._products[layer] = (before, after, multiplies)
        self.work.clear()
        self.work.calls.clear()
        for first, second, number in self._products.values():
            self.work[first, second] = self.work.get((first, second), 0) + number
            self.work.calls[first, second] = self.work.calls.get((first, second), 0) + 1

    def drawn(self, site: Site) -> tuple[Drawn, ...]:
        """Patterns of a site in this step, in the order in which its uses were entered."""
        pair = self.pair(site)
        return tuple(
            Drawn(e.layout.n, e.use, e.rows, self._staging[e.device].values)
            for e in self._entries.values()
            if e.site is site and e.pair == pair
        )


def _forget(ref: Callable[[], nn.Module | None]) -> None:
    """Remove the attributes that graphs read from a module."""
    if (module := ref()) is not None:
        for name in ("graph_key", "graph_table", "graph_dp", "graph_keep"):
            vars(module).pop(name, None)


def book_of(module_id: str) -> Book | None:
    """The book of the model that a module belongs to, given its ``id`` as text; None if it is not converted."""
    found = [book for book in list(_BOOKS.values()) if book.calls.module(module_id) is not None]
    return found[-1] if found else None


def site_of(key: str) -> tuple[Book, Site]:
    """Book and site for the key of :func:`.operator.drop`."""
    serial, index = key.split(".")
    book = _BOOKS[int(serial)]
    return book, book.sites[int(index)][0]
