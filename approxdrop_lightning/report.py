"""The report of a conversion: what was found and what is skipped, one row per dropout."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from approxdrop_lightning.layers.site import Site
from approxdrop_lightning.text_table import text_table
from approxdrop_lightning.work import Ledger

_COLUMNS = ("dropout", "rate", "producer", "consumers", "saves", "skipped")


@dataclass
class Row:
    """One dropout of the model.

    Attributes:
        name: Its name in the model.
        rate: Its rate; None if unknown.
        reason: Why it was not converted; None if it was.
        site: Its site, if it was converted.
        own_rate: The model's own rate, if a different one was requested.
    """

    name: str
    rate: float | None
    reason: str | None = None
    site: Site | None = None
    own_rate: float | None = None

    @property
    def producer(self) -> str | None:
        """Layers before the dropout that compute kept units only; None if there are none, or not yet."""
        return ", ".join(sorted(self.site.producers)) or None if self.site else None

    @property
    def whole(self) -> str | None:
        """What reads the layer before the dropout whole, which is then no producer; None if nothing does."""
        if self.site is None or self.site.producers or not self.site.whole:
            return None
        return f"read whole by {', '.join(sorted(set(self.site.whole.values())))}"

    @property
    def consumers(self) -> tuple[str, ...]:
        """Layers after the dropout that have so far read kept units only, or with kept weights only."""
        return tuple(sorted(self.site.consumers)) if self.site else ()

    @property
    def skipped(self) -> str:
        """What is skipped, or why nothing is."""
        if self.site is None:
            return f"nothing: {self.reason}"
        if self.site.rate == 0:
            return "nothing: the rate is 0"
        if self.site.graph_masked and not self.site.skips:
            return "nothing: compiled by a backend that does not know it: masked"
        if self.site.reason:
            return f"nothing: {self.site.reason}"
        if self.site.too_small and not self.site.skips:
            return f"nothing: {self.site.too_small}"
        if self.site.conventional and not self.site.skips:  # in all calls
            return f"nothing: {self.site.conventional}"
        if self.is_unseen:
            if self.site.steps:
                own = self.rate if self.own_rate is None else self.own_rate
                return (
                    "nothing: not called in training mode so far: frozen, not used, or a function (of attention, for "
                    f"one) is given its rate, the model's own of {own:g}"
                )
            return "not known before the first training batch"
        skipped, remarks = " and ".join(self.site.skips), self.site.remarks
        if self.site.conventional:  # in some calls
            remarks = [*remarks, self.site.conventional]
        return "; ".join([skipped, *remarks]) if skipped else f"nothing: {'; '.join(remarks)}"

    @property
    def is_unseen(self) -> bool:
        """Whether it was converted but has not dropped anything yet."""
        site = self.site
        return site is not None and not (
            site.uses or site.last_patterns or site.producers | site.consumers | site.dense_readers
        )


@dataclass
class Report:
    """One row per dropout. ``str(report)`` is a table.

    Producers and consumers are found by following the data, so they are known after the first forward pass in
    training mode; until then the rows say so.
    """

    rows: list[Row] = field(default_factory=list)
    #: Multiplies of the converted layers.
    work: list[Ledger] = field(default_factory=list)
    #: Multiplies of all other layers.
    elsewhere: int = 0
    #: Linear layers that could not be converted, and why.
    notes: list[str] = field(default_factory=list)

    def found(self, name: str, rate: float, site: Site) -> None:
        """Add a call that a compiled graph contains, in place of the row without a site for its line of code."""
        at = self._left_at(name)
        self.rows[at : at + 1] = [Row(name, rate, site=site)]

    def left(self, name: str, rate: float | None, reason: str) -> None:
        """Add a dropout that is left as it is, unless there is such a row for the same call (line of code) already.

        A row from the source code, which does not show the rate, gives way to one from a graph.
        """
        at = self._left_at(name)
        if at == len(self.rows) or (self.rows[at].rate is None and rate is not None):
            self.rows[at : at + 1] = [Row(name, rate, reason)]

    def _left_at(self, name: str) -> int:
        """Index of the row without a site for the line of code that a name ends with; that of a new row if none."""
        place = name.rpartition(" (")[2] if ":" in name else None
        for i, row in enumerate(self.rows):
            if place is not None and row.site is None and row.name.endswith(f" ({place}"):
                return i
        return len(self.rows)

    def _products(self) -> list[tuple[int, float]]:
        """Multiplies of each product of the last step, and the share that is executed in expectation."""
        return [(n, _executed(*sites)) for work in self.work for sites, n in work.items()]

    @property
    def saved(self) -> float:
        """Share of the model's multiplies that is saved in expectation, in [0, 1).

        Linear, convolutional, recurrent and attention layers count; products that the model's own code computes with
        PyTorch functions do not.
        """
        return sum(n * (1 - share) for n, share in self._products()) / self.multiplies if self.multiplies else 0.0

    @property
    def saved_time(self) -> float:
        """Share of the time of the model's products that is saved in expectation on this device, in [0, 1).

        The multiplies that each product saves, minus the overhead of skipping that the policy assumes
        (:data:`.policy.THRESHOLDS`). All other work (normalisation, activations, the loss, the optimizer) takes as
        long as before.
        """
        net = 0.0
        for work in self.work:
            for sites, n in work.items():
                overheads = [site.overhead for site in sites if site is not None]
                if overheads:
                    net += max(n * (1 - _executed(*sites)) - max(overheads) * work.calls[sites], 0.0)
        return net / self.multiplies if net else 0.0

    @property
    def multiplies(self) -> int:
        """Multiplies of one forward pass of the unconverted model, as far as they are counted."""
        return self.elsewhere + sum(n for n, _ in self._products())

    def saved_by(self, row: Row) -> float:
        """Share of them that one dropout alone would save. Shares overlap: two dropouts can skip one multiply."""
        if row.site is None:
            return 0.0
        own = sum(n for work in self.work for sites, n in work.items() if row.site in sites)
        return own * row.site.rate / self.multiplies if own else 0.0

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, name: str | int) -> Row:
        """The row at a position or of a name."""
        return self.rows[name] if isinstance(name, int) else next(r for r in self.rows if r.name == name)

    @property
    def sites(self) -> list[Site]:
        """All sites."""
        return [row.site for row in self.rows if row.site is not None]

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                r.name,
                "?" if r.rate is None else f"{r.rate:g}" + ("" if r.own_rate is None else f" (own: {r.own_rate:g})"),
                r.producer or r.whole or "-",
                ", ".join(r.consumers) or "-",
                f"{self.saved_by(r):.0%}",
                r.skipped,
            )
            for r in self.rows
        ]

    @property
    def _total(self) -> str:
        return (
            f"saved in expectation: {self.saved_time:.0%} of the time of the model's products "
            f"({self.saved:.0%} of their multiplies, less what skipping costs)"
        )

    def __str__(self) -> str:
        return "\n".join([text_table(_COLUMNS, self._cells()), *self.notes, self._total])

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        lines = [f"<tr>{''.join(f'<th>{name}</th>' for name in _COLUMNS)}</tr>"]
        for row in self._cells():
            lines.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>")
        below = "".join(f"<p>{html.escape(line)}</p>" for line in (*self.notes, self._total))
        return f"<table>{''.join(lines)}</table>{below}"


def _executed(before: Site | None, after: Site | None) -> float:
    """Share of a product between two sites that is executed in expectation."""
    sites = [site for site in (before, after) if site is not None]
    if len(sites) == 2 and sites[0].sampler is sites[1].sampler:
        # One (dp, keep) for both: the mean of the square, not the square of the mean.
        distribution = sites[0].sampler.distribution
        pairs = zip(distribution.support, distribution.probabilities, strict=True)
        return sum(k * (keep / dp) ** 2 for (dp, keep), k in pairs)
    return math.prod(1 - site.rate for site in sites)
