"""What a conversion found and did, one row per dropout."""

from __future__ import annotations

from dataclasses import dataclass, field

from approxdrop_lightning.layers.site import Site

_COLUMNS = ("dropout", "rate", "producer", "consumers", "skipped")


@dataclass
class Row:
    """One dropout of the model.

    Attributes:
        name: Its name in the model.
        rate: Its rate; None if it is not known.
        reason: Why nothing is skipped, known before training; None if the dropout became a site.
        site: The site, if it became one.
    """

    name: str
    rate: float | None
    reason: str | None = None
    site: Site | None = None

    @property
    def producer(self) -> str | None:
        """Layers whose outputs are dropped here and computed for kept units only; None if not seen (yet)."""
        return ", ".join(sorted(self.site.producers)) or None if self.site else None

    @property
    def consumers(self) -> tuple[str, ...]:
        """Layers that have read the output so far, its kept units only."""
        return tuple(sorted(self.site.consumers)) if self.site else ()

    @property
    def skipped(self) -> str:
        """What is skipped, or why nothing is."""
        if self.site is None:
            return f"nothing: {self.reason}"
        if self.site.narrow:
            return f"nothing: {self.site.narrow} features are too few to gain (min_features={self.site.min_features})"
        if not self.site.last_patterns and not self.site.producers | self.site.consumers | self.site.dense_readers:
            if self.site.steps > 1:
                return "nothing: it was not called in training mode"
            return "not known before the first training batch"
        parts = (["producer's rows"] if self.producer else []) + (["consumers' columns"] if self.consumers else [])
        readers = ", ".join(sorted(self.site.dense_readers))
        if not parts:
            return f"nothing: no linear layer before it, and read whole by {readers or 'nobody'}"
        return " and ".join(parts) + (f"; read whole by {readers}" if readers else "")


@dataclass
class Report:
    """One row per dropout found. ``str(report)`` is a table.

    Producers and consumers are found by the data's own way, so they are filled in by the first training
    forward; before it a row says so.
    """

    rows: list[Row] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, name: str | int) -> Row:
        """Row by position or by the dropout's name."""
        return self.rows[name] if isinstance(name, int) else next(r for r in self.rows if r.name == name)

    @property
    def sites(self) -> list[Site]:
        """All sites."""
        return [row.site for row in self.rows if row.site is not None]

    def __str__(self) -> str:
        # Lines as wide as they are: a log file has no width.
        cells = [_COLUMNS] + [
            (
                r.name,
                "?" if r.rate is None else f"{r.rate:g}",
                r.producer or "-",
                ", ".join(r.consumers) or "-",
                r.skipped,
            )
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
