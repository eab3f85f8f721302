"""Long runs: memory does not grow, and the realised rate does not drift."""

import gc
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from approxdrop_lightning import PatternDistribution, PatternSampler, approximate, resample

#: Threshold for a standard normal deviate: exceeded by chance in 1 of 1.7 million checks.
LIMIT = 5.0
FALSE_ALARM = math.erfc(LIMIT / math.sqrt(2))


def resident():
    """Memory of this process in MiB."""
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS")


def growth(step, warm_up, count):
    """MiB by which memory grows over ``count`` steps after ``warm_up``."""
    for _ in range(warm_up):
        step()
    before = resident()
    for _ in range(count):
        step()
    return resident() - before


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"interleave": True, "shuffle": True, "block_size": 16}])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_a_hundred_thousand_draws(rate, settings):
    distribution = PatternDistribution.search(rate, 10, keep="any", concentration=100.0)
    sampler = PatternSampler(distribution, seed=1, **settings)
    shares = []

    def step():
        sampler.draw()
        shares.append(1 - sampler.pattern(256).share)

    grown = growth(step, 5_000, 100_000)
    # The list itself: a float and its place for each step.
    grown -= 100_000 * 32 / 2**20
    shares = torch.tensor(shares, dtype=torch.float64)
    # Of 256 units a pattern drops its share up to a cell's rounding, which has mean 0 over the offsets.
    deviate = float((shares.mean() - rate) / (shares.std() / math.sqrt(len(shares))))
    halves = [float(part.mean()) for part in shares.chunk(2)]
    drift = (halves[1] - halves[0]) / float(shares.std() * math.sqrt(4 / len(shares)))
    print(
        f"rate {rate}: realised {float(shares.mean()):.5f}, {deviate:+.2f} standard errors; between halves "
        f"{drift:+.2f}; memory {grown:+.2f} MiB; a false alarm has probability {FALSE_ALARM:.1e}"
    )
    assert abs(deviate) < LIMIT
    assert abs(drift) < LIMIT
    assert grown < 4


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"interleave": False}, {"pattern": "tile"}], ids=str)
def test_ten_thousand_training_steps(options):
    torch.manual_seed(0)
    rate = 0.5
    model = nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Dropout(rate), nn.Linear(64, 64), nn.Dropout(rate), nn.Linear(64, 4)
    )
    report = approximate(model, seed=0, concentration=100.0, min_gain=0, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, y = torch.randn(64, 32), torch.randint(4, (64,))
    total, steps, squares = 0.0, 0, 0.0

    def step():
        nonlocal total, steps, squares
        resample(model)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        patterns = [p for site in report.sites for p in site.last_patterns]
        dropped = sum(1 - p.share for p in patterns) / len(patterns)
        total, steps, squares = total + dropped, steps + 1, squares + dropped**2

    grown = growth(step, 1_000, 10_000)
    mean = total / steps
    error = math.sqrt(max(squares / steps - mean**2, 0) / steps)
    print(
        f"{options}: realised {mean:.5f} after {steps:,} steps, {(mean - rate) / error:+.2f} standard errors; "
        f"memory {grown:+.2f} MiB; a false alarm has probability {FALSE_ALARM:.1e}"
    )
    assert abs(mean - rate) < LIMIT * error
    assert grown < 4
