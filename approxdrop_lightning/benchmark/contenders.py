"""What is compared: ways to train a network with dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from approxdrop_lightning.benchmark.workloads import Workload
from approxdrop_lightning.conversion import conversion_of
from approxdrop_lightning.graph.reference import mask
from approxdrop_lightning.graph.rewrite import rewrite
from approxdrop_lightning.report import Report
from approxdrop_lightning.surgery import approximate, resample

#: What `approximate` is told for each pattern.
PATTERNS: dict[str, dict[str, Any]] = {
    "row": {},
    "shared": {"interleave": False, "shuffle": False},
    "paper": {"interleave": False, "shuffle": False, "keep": "one", "concentration": 0.0},
    "tile": {"pattern": "tile"},
    "dropconnect": {"pattern": "dropconnect"},  # masked weights: what "tile" is to be compared with
}
#: Draws in which every pair of a compiled run comes: its probability is 1% at least.
_DRAWS = 1000
#: What they are compared with. "conventional" is what a user has today.
BASELINES = ("conventional", "none", "compiled", "sliced", "sliceout", "narrow")


@dataclass
class Step:
    """One training step of a contender, as often as it is called.

    Attributes:
        name: For the table.
        model: The network, converted or not.
        workload: What it is trained on.
        report: The conversion's, if there was one.
        compiled: Whether the network runs under ``torch.compile``.
    """

    name: str
    model: nn.Module
    workload: Workload
    report: Report | None = None
    compiled: bool = False
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, fused=True)
        self._forward = torch.compile(self.model) if self.compiled else self.model

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Run the network under ``torch.compile`` from now on."""
        self._forward, self.compiled = torch.compile(self.model, backend=backend), True

    def compile_all(self) -> None:
        """Run a compiled step of each pair that may be drawn, the rare ones too: no graph is compiled later."""
        book = None if self.report is None else conversion_of(self.model).book
        if book is None:
            self()
            return
        seen = set()
        for _ in range(_DRAWS):
            self.draw()
            pairs = tuple(book.pair(site) for site, _ in book.sites)
            if pairs not in seen:
                seen.add(pairs)
                self.after_draw()

    def draw(self) -> None:
        """Draw the patterns, if the network has any."""
        if self.report is not None:
            resample(self.model, self.workload.batch)

    def loss_and_gradients(self) -> Tensor:
        """Draw the patterns, run forward and backward."""
        self.draw()
        return self._loss_and_gradients()

    def _loss_and_gradients(self) -> Tensor:
        x, y = self.workload.batch
        loss = F.cross_entropy(self._forward(x), y)
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        """The whole step: draw, forward, loss, backward, clipping if any, optimizer."""
        self.draw()
        self.after_draw()

    def after_draw(self) -> Tensor:
        """All of the step but the draw, which is what a CUDA graph can hold; returns the loss."""
        self.optimizer.zero_grad()
        loss = self._loss_and_gradients()
        if self.workload.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.workload.clip)
        self.optimizer.step()
        return loss


def contender(workload: Workload, name: str, rate: float, seed: int = 0, **options: Any) -> Step:
    """A contender by name: one of ``BASELINES`` or ``PATTERNS``.

    Raises:
        ValueError: It cannot run this workload.
    """
    torch.manual_seed(seed)
    device, dtype = workload.batch[0].device, torch.get_default_dtype()
    report = None
    if name in ("sliced", "sliceout"):
        if workload.sliced is None:
            raise ValueError(f"{name} is written for MLPs only")
        model = workload.sliced(rate, name == "sliceout")
    elif name == "narrow":
        model = workload.narrow(rate)
    else:
        model = workload.make(0.0 if name == "none" else rate)
    model.to(device=device, dtype=dtype)
    if name in PATTERNS:
        report = approximate(model, seed=seed, **PATTERNS[name], **options)
    return Step(name, model, workload, report, compiled=name == "compiled")


def verify(step: Step, rate: float, seed: int = 0, **options: Any) -> None:
    """Compare loss and all gradients of a converted network with those of the reference backend.

    Both skip wherever it is possible: stock dropout has no patterns that both could have.

    Raises:
        AssertionError: They differ by more than rounding does.
    """
    options = options | {"min_gain": 0, "pattern_everywhere": True}
    step = contender(step.workload, step.name, rate, seed, **options)  # the step itself is left as it is
    reference = contender(step.workload, step.name, rate, seed, **options | {"backend": "reference"})
    _check_equal(step, reference)


def verify_compiled(step: Step, rate: float, seed: int = 0, **options: Any) -> None:
    """Compare loss and all gradients of a compiled network with those of one in whose graphs dropouts are masks.

    Both graphs run as they are, without inductor's code. Nothing is left to native dropout because it is small.

    Raises:
        AssertionError: They differ by more than rounding does, or nothing was skipped.
    """
    options = options | {"min_gain": 0}
    mine, masked = (contender(step.workload, step.name, rate, seed, **options) for _ in range(2))
    mine.compile(_rewritten)
    masked.compile(_masked)
    _check_equal(mine, masked)
    if mine.report is None or not any(site.skips for site in mine.report.sites):
        raise AssertionError(f"{step.name}: nothing is skipped in its compiled graphs")


def _rewritten(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Backend of ``torch.compile``: the pass, and no code generator."""
    rewrite(gm)
    return gm.forward


def _masked(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """The same, with masks."""
    mask(gm)
    return gm.forward


def _check_equal(step: Step, reference: Step) -> None:
    for seed in range(2):
        losses = []
        for one in (step, reference):
            one.optimizer.zero_grad()
            torch.manual_seed(seed)  # of native dropout, if there is some
            losses.append(one.loss_and_gradients())
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
        largest = max(p.grad.norm() for p in reference.model.parameters() if p.grad is not None)
        for (key, found), wanted in zip(step.model.named_parameters(), reference.model.parameters(), strict=True):
            assert found.grad is not None and wanted.grad is not None, f"{step.name}: {key} has no gradient"
            # A bias before a batch norm has none but rounding errors; a PReLU's slope has all those of its inputs.
            floor = largest * (1e-2 if wanted.numel() == 1 else 1e-5)
            error = (found.grad - wanted.grad).norm() / max(wanted.grad.norm(), floor)
            if not error < 8e-3:  # rounding turns some ReLUs on or off, each of which may change it by half a percent
                raise AssertionError(f"{step.name}: the gradient of {key} is off by {error:.1%} of its norm")
