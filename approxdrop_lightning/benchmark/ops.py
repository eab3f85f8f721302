"""Benchmarks of single operations, forward and backward, and of the callback's overhead per step."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approxdrop_lightning import functional
from approxdrop_lightning.benchmark import measure
from approxdrop_lightning.benchmark.contenders import PATTERNS
from approxdrop_lightning.options import Options
from approxdrop_lightning.surgery import approximate, resample


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the benchmark's table: linear products of one width, the LSTM recurrence, and drawing patterns."""
    width, batch = (options.hidden or [2048])[0], options.batch or 128
    found = []
    for rate in options.rate:
        for pattern in options.pattern:
            weights = PATTERNS[pattern].get("pattern", "row") != "row"
            for sides in ("weight",) if weights else ("in", "out", "in and out"):
                found += _linear(width, batch, rate, pattern, sides, options)
    found += _recurrence(options)
    return found + _drawing(options)


def _linear(
    n: int, batch: int, rate: float, name: str, sides: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    settings = PATTERNS[name]
    sampler = Options(rate=rate, **settings).sampler(rate, options.seed)
    shapes = (n, n), (n,), (batch, n)
    weight, bias, x = (torch.randn(shape, device=options.device, requires_grad=True) for shape in shapes)

    def run(backend: str) -> Sequence[Tensor]:
        if sides == "weight":
            draw = sampler.tiles if settings["pattern"] == "tile" else sampler.bernoulli
            y = functional.tile_linear(x, weight, bias, draw(n, n), backend=backend)
            return torch.autograd.grad(y, (weight, bias, x), y.detach())
        inside = sampler.pattern(n) if "in" in sides.split() else None
        outside = sampler.pattern(n) if "out" in sides else None
        packed = x if inside is None else functional.pack(x, inside).detach().requires_grad_()
        y = functional.row_linear(packed, weight, bias, inside, outside, backend=backend, leading_shape=(batch,))
        return torch.autograd.grad(y, (weight, bias, packed), y.detach())

    def dense() -> None:
        y = F.linear(x, weight, bias)
        torch.autograd.grad(y, (weight, bias, x), y.detach())

    def step(backend: str) -> Callable[[], None]:
        def one() -> None:
            sampler.draw()
            run(backend)

        return one

    sampler.draw()
    state = sampler.state_dict()
    gradients = []
    for backend in ("reference", *options.backend):
        sampler.load_state_dict(state)
        gradients.append(run(backend))
    wanted, *all_mine = gradients
    for mine in all_mine:
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2 * b.abs().max().item())
    title = f"linear {n}x{n}, batch {batch}, {sides}"
    return _timed(title, rate, {"dense": dense} | {f"{name} ({b})": step(b) for b in options.backend}, options)


def _recurrence(options: argparse.Namespace) -> list[dict[str, Any]]:
    hidden, steps, batch = (options.hidden or [650])[0], options.steps or 35, 20
    vendor = nn.LSTM(hidden, hidden, device=options.device)
    x = torch.randn(steps, batch, hidden, device=options.device, requires_grad=True)
    zeros = torch.zeros(batch, hidden, device=options.device)
    weight_ih, weight_hh, bias_ih, bias_hh = vendor.all_weights[0]

    def ours() -> None:
        inputs = F.linear(x, weight_ih, bias_ih + bias_hh)
        functional.lstm_sequence(inputs, zeros, zeros, weight_hh)[0].sum().backward()

    def theirs() -> None:
        vendor(x)[0].sum().backward()

    title = f"LSTM layer {hidden}, T={steps}, B={batch}"
    return _timed(title, 0.0, {"dense": theirs, "lstm_sequence": ours}, options)


def _drawing(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Linear(650, 650), nn.Dropout(0.5))))
    sites = approximate(model, seed=options.seed).sites

    def patterns() -> None:
        resample(model)
        for site in sites:
            site.pattern(650)

    def realised_rate() -> None:
        sum(1 - p.share for site in sites for p in site.last_patterns)

    steps: dict[str, Callable[[], None]] = {
        "before the batch": lambda: resample(model),
        "before it, and a pattern for each site": patterns,
        "after it": realised_rate,
    }
    return _timed("what the callback does per step, ten sites", 0.5, steps, options)


def _timed(
    workload: str, rate: float, steps: dict[str, Callable[[], None]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    seconds = measure.interleaved(steps, options.repeats, consecutive=options.consecutive)
    found = []
    for name, values in seconds.items():
        first, median, third = measure.quartiles(values)
        found.append(
            {
                "workload": workload,
                "rate": rate,
                "contender": name,
                "median_ms": median * 1e3,
                "first_quartile_ms": first * 1e3,
                "third_quartile_ms": third * 1e3,
                "to_conventional": measure.ratio(seconds["dense"], values) if "dense" in seconds else None,
                "peak_mb": measure.peak_memory(steps[name]),
            }
        )
    return found
