"""Part 1: kernels, networks and a captured step against what they must equal."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from approxdrop_lightning import functional
from approxdrop_lightning.benchmark import contenders, workloads
from approxdrop_lightning.benchmark.gpu.measuring import (
    BLOCK,
    RATES,
    Case,
    Row,
    Scale,
    dtype_of,
    on_device,
    pattern_tables,
)
from approxdrop_lightning.ops.pack import pack_ops, reference
from approxdrop_lightning.patterns.tile import TilePattern
from approxdrop_lightning.step_graphs import CudaCapture, StepGraphs


def cases(device: str, scale: Scale) -> Iterator[Case]:
    """Cases of part 1."""
    names = ("fp32", "fp16", "bf16") if device == "cuda" else ("fp32",)
    for name in names:
        for rate in RATES:
            for n in (256, 650) if device == "cuda" else (64, 50):
                what = {"what": f"pack and unpack {n}x{n}", "dtype": name, "rate": rate}
                yield what, partial(_check_pack, n, rate, name, device)
    for name in names:
        what = {"what": "tiles 300x420", "dtype": name, "rate": 0.5}
        yield what, partial(_check_tiles, name, device)
    backends = ("auto", "triton") if device == "cuda" else ("auto",)
    for pattern in ("row", "shared", "tile"):
        for backend in backends:
            what = {"what": f"MLP, {pattern}, {backend}", "dtype": "fp32", "rate": 0.5}
            yield what, partial(_check_network, pattern, backend, False, device)
    what = {"what": "MLP, row, auto, torch.compile", "dtype": "fp32", "rate": 0.5}
    yield what, partial(_check_network, "row", "auto", True, device)
    yield {"what": "captured step, conventional", "dtype": "fp32", "rate": 0.0}, partial(_check_capture, device)


def _check_pack(n: int, rate: float, name: str, device: str) -> Row:
    dtype = dtype_of(name)
    if n % BLOCK:
        groups = 2
        rows, columns = (torch.randperm(n)[: n - n % groups].view(groups, -1).int().to(device) for _ in range(2))
        tables = (rows, columns, reference.slots(rows, n, 1), reference.slots(columns, n, 1))
        run = 1
    else:
        tables, run = pattern_tables(n, n, rate, device), BLOCK
    dense = torch.randn(n, n, device=device).to(dtype)
    packed = pack_ops.pack(dense, *tables, run)
    error = (packed - reference.pack(dense, *tables[:2])).abs().max().item()
    wanted = reference.unpack(packed, *tables[2:], n, n)
    error = max(error, (pack_ops.unpack(packed, *tables, n, n, run) - wanted).abs().max().item())
    return {"error_max": error, "ok": error <= (0.0 if rate >= 0.5 else 0.05)}


def _check_tiles(name: str, device: str) -> Row:
    dtype = dtype_of(name)
    pattern = TilePattern(300, 420, 2, 1, 1, 16)
    x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((70, 420), (300, 420)))
    found = functional.tile_linear(x, weight, None, pattern, 2.0).double()
    wanted = functional.tile_linear(x.double(), weight.double(), None, pattern, 2.0, "reference")
    error = ((found - wanted).norm() / wanted.norm()).item()
    return {"error_max": error, "ok": error < (1e-4 if dtype == torch.float32 else 1e-2)}


def _check_network(pattern: str, backend: str, compiled: bool, device: str) -> Row:
    torch.backends.cuda.matmul.allow_tf32 = False
    options: dict[str, Any] = {"backend": backend, "min_gain": 0}
    workload = on_device(workloads.mlp([100, 256, 192, 10], 96), device)
    step = contenders.contender(workload, pattern, 0.5, **options)
    if not compiled:
        contenders.verify(step, 0.5, **options)  # raises
        return {"ok": True}
    _check_compiled(step, 0.5, device)
    return {"ok": True}


def _check_compiled(step: contenders.Step, rate: float, device: str) -> None:
    """Loss and gradients against the network with masks, whose patterns are those that the step says it had."""
    step.compile("inductor" if device == "cuda" else "aot_eager")
    assert step.report is not None
    x, target = step.workload.batch
    linears = [m for m in step.model.modules() if isinstance(m, nn.Linear)]
    for number in range(6):
        step.optimizer.zero_grad()
        loss = step.loss_and_gradients()
        leaves = [p.detach().clone().requires_grad_() for m in linears for p in (m.weight, m.bias)]
        hidden = x
        for i, site in enumerate(step.report.sites):
            pattern: Any = site.last_patterns[0]
            mask = pattern.mask(len(x), dtype=torch.float32, value=1 / (1 - rate)).to(device)
            hidden = F.linear(hidden, leaves[2 * i], leaves[2 * i + 1]).relu() * mask
        wanted = F.cross_entropy(F.linear(hidden, leaves[-2], leaves[-1]), target)
        grads = torch.autograd.grad(wanted, leaves)
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-3, atol=1e-4)
        for mine, theirs in zip((p.grad for m in linears for p in (m.weight, m.bias)), grads, strict=True):
            assert mine is not None
            error = ((mine - theirs).norm() / theirs.norm()).item()
            if not error < 5e-3:
                raise AssertionError(f"step {number}: a gradient is off by {error:.1%} of its norm")


def _check_capture(device: str) -> Row:
    if device != "cuda":
        return {"ok": None, "note": "only with a GPU"}
    workload = on_device(workloads.mlp([100, 256, 192, 10], 96), device)
    steps = [contenders.contender(workload, "none", 0.0) for _ in range(2)]
    graphs = StepGraphs(CudaCapture())
    for _ in range(8):
        graphs.run(None, [], lambda _: steps[0]())
        steps[1]()
    for a, b in zip(steps[0].model.parameters(), steps[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return {"ok": graphs.counts.replayed == 5, "note": str(graphs.counts)}
