"""Illustration of the method: which weights a batch reads, computed from actual patterns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from approxdrop_lightning.patterns.row import RowPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS, UNITS, BLOCK = 8, 24, 2  # rows of the batch, units of each layer, units per block
SKIPPED, BOTH = "#ececec", "#5d4a8a"
GROUPS = (
    *("#1f77b4", "#ff9e2c", "#2ca02c", "#d62728", "#17becf"),
    *("#e377c2", "#8c564b", "#bcbd22", "#7f7f7f", "#9467bd"),
)


@dataclass(frozen=True)
class Arrangement:
    """One kind of dropout: which units are kept, and which weights are read for them.

    Attributes:
        title: Name of the kind.
        note: Its costs and benefits.
        kept: Group that keeps each input of each row of the batch, counted from 1; 0 if dropped. ``[ROWS, UNITS]``.
        read: Group that reads each weight, counted from 1; 0 if none does, -1 if several do. ``[UNITS, UNITS]``.
        multiplies: Multiplies performed, as a share of those of a dense layer.
    """

    title: str
    note: str
    kept: Tensor
    read: Tensor
    multiplies: float


def arrangements(dp: int, keep: int, seed: int = 0) -> list[Arrangement]:
    """Conventional dropout, a shared pattern and an interleaved one, each on both sides of a weight.

    Args:
        dp: Period of the patterns.
        keep: Number of cells kept of ``dp``.
        seed: Seed of orders, offsets and conventional masks.
    """
    generator = torch.Generator().manual_seed(seed)
    rate = 1 - keep / dp
    conventional = (torch.rand(ROWS, UNITS, generator=generator) >= rate).long()
    everything = torch.ones(UNITS, UNITS, dtype=torch.long)
    found = [
        Arrangement("Conventional dropout", "zeros are multiplied", conventional, everything, 1.0),
    ]
    for title, interleave in (("Shared pattern", False), ("Interleaved pattern", True)):
        inputs, outputs = (_draw(dp, keep, interleave, generator) for _ in range(2))
        masks = inputs.n_groups
        note = f"{masks} masks: rows take turns" if interleave else "one mask for the whole batch"
        found.append(_of_patterns(title, note, inputs, outputs))
    return found


def _draw(dp: int, keep: int, interleave: bool, generator: torch.Generator) -> RowPattern:
    order = torch.randperm(UNITS // BLOCK, generator=generator)
    offset = int(torch.randint(dp, (), generator=generator))
    return RowPattern(UNITS, dp, offset, keep, interleave, order, BLOCK)


def _of_patterns(title: str, note: str, inputs: RowPattern, outputs: RowPattern) -> Arrangement:
    kept, read = torch.zeros(ROWS, UNITS, dtype=torch.long), torch.zeros(UNITS, UNITS, dtype=torch.long)
    multiplied = 0
    for group, rows in enumerate(inputs.row_groups((ROWS,))):
        columns, lines = inputs.units(group).index, outputs.units(group).index
        kept[rows.index[:, None], columns] = group + 1
        part = read[lines[:, None], columns]
        read[lines[:, None], columns] = torch.where(part == 0, group + 1, -1)
        multiplied += rows.count * len(columns) * len(lines)
    return Arrangement(title, note, kept, read, multiplied / (ROWS * UNITS * UNITS))


def draw(rate: float, dp: int, keep: int, path: Path) -> None:
    """Plot :func:`arrangements` to a file.

    Args:
        rate: The dropout rate, for the title.
        dp: Period of the patterns, for example the most probable one for the rate.
        keep: Number of cells kept of ``dp``.
        path: PNG, SVG or PDF file; the suffix selects the format.

    Raises:
        ValueError: The file format is not supported.
        ModuleNotFoundError: Matplotlib is not installed; the extra ``train`` includes it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a picture needs matplotlib: pip install 'approxdrop-lightning[train]'", name="matplotlib"
        ) from error
    parts = arrangements(dp, keep)
    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(parts), height_ratios=(ROWS, UNITS))
    for column, part in enumerate(parts):
        above, below = axes[:, column]
        _cells(above, part.kept)
        _cells(below, part.read)
        above.set_title(part.title, fontsize=14, fontweight="bold")
        above.set_xlabel(part.note, fontsize=11, labelpad=6)
        below.set_xlabel(f"{part.multiplies:.0%} of the multiplies", fontsize=14, fontweight="bold", labelpad=8)
    axes[0, 0].set_ylabel(f"units of a batch\n({ROWS} rows)", fontsize=11)
    axes[1, 0].set_ylabel("weight between two\nlayers with dropout", fontsize=11)
    key = "in colour: kept units, and the weights read for them; grey: dropped, skipped"
    figure.suptitle(f"Dropout at {rate:g}, {key}")
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)


def _cells(axis: Axes, groups: Tensor) -> None:
    """Draw each entry as a square in the colour of its group."""
    from matplotlib.colors import ListedColormap

    colours: Sequence[str] = (BOTH, SKIPPED, *GROUPS)
    shown = (groups + 1).clamp(max=len(colours) - 1)
    axis.imshow(shown.numpy(), cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1, interpolation="nearest")
    lines, columns = groups.shape
    axis.set_xticks([x - 0.5 for x in range(columns + 1)], minor=True)
    axis.set_yticks([y - 0.5 for y in range(lines + 1)], minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    for side in axis.spines.values():
        side.set_visible(False)
