"""Tables in plain text, as wide as their content: for logs, terminals and notebooks alike."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """Lay out a table.

    Args:
        header: Names of the columns.
        rows: One string per column each.
        numbers: Columns that are aligned to the right.

    Returns:
        The header, a rule, and a line per row, without a final newline.
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])

    def text(line: Sequence[str]) -> str:
        cells = zip(header, line, widths, strict=True)
        return "  ".join(c.rjust(w) if name in numbers else c.ljust(w) for name, c, w in cells).rstrip()

    return "\n".join(map(text, lines))
