"""Command line that prints and plots pattern distributions: ``python -m approxdrop_lightning.distribution 0.5``."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from approxdrop_lightning.distribution import CONCENTRATION, KEEP, MAX_DP, PatternDistribution
from approxdrop_lightning.text_table import text_table

_BAR = 40  # characters for a probability of 1


def main(arguments: list[str] | None = None) -> None:
    """Print one distribution pattern by pattern, or several with one line each."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    settings = list(itertools.product(asked.rate, asked.keep, asked.max_dp, asked.concentration))
    try:
        found = [
            PatternDistribution.search(rate, max_dp, asked.search, keep, concentration)
            for rate, keep, max_dp, concentration in settings
        ]
    except ValueError as error:
        parser.error(str(error))
    if asked.plot is not None:
        if len(found) != 1:
            parser.error(f"--plot draws one distribution, got {len(found)}")
        _plot(parser, found[0], settings[0][0], asked.plot)
    if len(found) == 1:
        print(_patterns(found[0]), end="\n\n")
    print(_summary(settings, found))


def _plot(parser: argparse.ArgumentParser, found: PatternDistribution, rate: float, path: Path) -> None:
    """Plot the most probable pattern."""
    from approxdrop_lightning.distribution.picture import draw

    dp, keep = found.support[max(range(len(found.support)), key=found.probabilities.__getitem__)]
    try:
        draw(rate, dp, keep, path)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        parser.error(f"--plot {path}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m approxdrop_lightning.distribution",
        description="How often each pattern is drawn. Several values of an option: one line for each combination.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("rate", type=float, nargs="+", help="dropout rate, in [0, 1)")
    parser.add_argument("--keep", nargs="+", choices=("one", "any"), default=[KEEP])
    parser.add_argument("--max-dp", type=int, nargs="+", default=[MAX_DP])
    parser.add_argument("--concentration", type=float, nargs="+", default=[CONCENTRATION], help="or inf")
    parser.add_argument("--search", choices=("maxent", "sgd"), default="maxent")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="draw which weights the most probable pattern skips, into a PNG, SVG or PDF",
    )
    return parser


def _patterns(found: PatternDistribution) -> str:
    pairs = sorted(zip(found.support, found.probabilities, strict=True), key=lambda pair: -pair[0][1] / pair[0][0])
    lines = []
    for (dp, keep), probability in pairs:
        if probability >= 0.001:
            bar = "#" * max(1, round(_BAR * probability))
            lines.append((str(dp), str(keep), f"{1 - keep / dp:.3f}", f"{probability:.3f}", bar))
    header = ("dp", "keep", "dropped", "probability", "")
    return f"patterns of a probability of 0.001 or more\n{text_table(header, lines, header[:-1])}"


def _summary(settings: list[tuple[float, str, int, float]], found: list[PatternDistribution]) -> str:
    header = ("rate", "keep", "max_dp", "concentration", "sd of rate", "entropy", "no dropout", "multiplies", "twice")
    lines = []
    for (rate, keep, max_dp, concentration), one in zip(settings, found, strict=True):
        kept = [m / dp for dp, m in one.support]
        one_side, both = (sum(k * u**n for k, u in zip(one.probabilities, kept, strict=True)) for n in (1, 2))
        lines.append((
            f"{rate:g}", keep, str(max_dp), f"{concentration:g}", f"{one.rate_std:.3f}",
            f"{one.entropy:.2f}", f"{one.dense_share:.1%}", f"{one_side:.1%}", f"{both:.1%}",
        ))  # fmt: skip
    title = (
        "per step: spread of the dropped share, entropy in nats, share of steps without dropout, multiplies left\n"
        "with dropout on one side of a layer and on both"
    )
    return f"{title}\n{text_table(header, lines, header)}"


if __name__ == "__main__":
    main()
