"""What is compared: networks, and ways to train them with dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
#: What they are compared with. "conventional" is what a user has today.
BASELINES = ("conventional", "none", "compiled", "sliced", "sliceout", "narrow")


class MLP(nn.Sequential):
    """Linear, ReLU and dropout for each hidden layer, then the output layer."""

    def __init__(self, widths: list[int], rate: float) -> None:
        layers: list[nn.Module] = []
        for a, b in pairwise(widths[:-1]):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(rate)]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))


class SlicedMLP(MLP):
    """Dropout by plain slicing of the weights: what can be had without this package, in two lines.

    Args:
        widths: Of all layers.
        rate: Dropout rate.
        contiguous: Whether one contiguous slice of the units is kept (SliceOut, Notin et al. 2020), else one in dp.
    """

    def __init__(self, widths: list[int], rate: float, contiguous: bool) -> None:
        super().__init__(widths, rate)
        self.rate, self.contiguous = rate, contiguous

    def _slice(self, n: int) -> slice:
        if self.contiguous:
            kept = round(n * (1 - self.rate))
            start = int(torch.randint(n - kept + 1, ()))
            return slice(start, start + kept)
        dp = round(1 / (1 - self.rate))
        return slice(int(torch.randint(dp, ())), None, dp)

    def forward(self, x: Tensor) -> Tensor:
        kept = slice(None)
        *hidden, last = [m for m in self if isinstance(m, nn.Linear)]
        for layer in hidden:
            out = self._slice(layer.out_features)
            x = F.linear(x, layer.weight[out, kept], layer.bias[out]).relu() / (1 - self.rate)
            kept = out
        return F.linear(x, last.weight[:, kept], last.bias)


class LanguageModel(nn.Module):
    """Embedding, LSTM layers and decoder, with dropout on all non-recurrent connections (Zaremba et al. 2014).

    Args:
        vocabulary: Number of words.
        hidden: Hidden and embedding size.
        layers: Number of LSTM layers.
        rate: Dropout rate.
    """

    def __init__(self, vocabulary: int, hidden: int, layers: int, rate: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.before, self.after = nn.Dropout(rate), nn.Dropout(rate)
        self.lstm = nn.LSTM(hidden, hidden, layers, dropout=rate)
        self.decoder = nn.Linear(hidden, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        y, _ = self.lstm(self.before(self.embedding(words)))
        return self.decoder(self.after(y)).flatten(0, 1)


@dataclass
class Workload:
    """A network and one batch for it.

    Attributes:
        name: For the table.
        make: Network of a dropout rate.
        narrow: Network that has the kept width of a rate, physically.
        batch: Input and target.
        clip: Largest norm of the gradient; None for no clipping.
        sliced: Network of a rate, dropped out by slices, contiguous or not; None if there is none.
    """

    name: str
    make: Callable[[float], nn.Module]
    narrow: Callable[[float], nn.Module]
    batch: tuple[Tensor, Tensor]
    clip: float | None = None
    sliced: Callable[[float, bool], nn.Module] | None = None


def mlp(widths: list[int], batch: int) -> Workload:
    """MLP classifier; ``widths`` of all layers, input and output included."""
    return Workload(
        f"MLP {'-'.join(map(str, widths))}, batch {batch}",
        lambda rate: MLP(widths, rate),
        lambda rate: MLP([widths[0], *(round(w * (1 - rate)) for w in widths[1:-1]), widths[-1]], 0.0),
        (torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))),
        sliced=lambda rate, contiguous: SlicedMLP(widths, rate, contiguous),
    )


def lstm(hidden: int, layers: int, steps: int, batch: int, vocabulary: int) -> Workload:
    """LSTM language model; its narrow twin has narrow inputs of all layers, and the same recurrent width."""
    words = torch.randint(vocabulary, (2, steps, batch))
    return Workload(
        f"LSTM {layers}x{hidden}, T={steps}, B={batch}, vocabulary {vocabulary}",
        lambda rate: LanguageModel(vocabulary, hidden, layers, rate),
        lambda rate: _NarrowLanguageModel(vocabulary, hidden, layers, round(hidden * (1 - rate))),
        (words[0], words[1].flatten()),
        clip=5.0,
    )


class _NarrowLanguageModel(nn.Module):
    def __init__(self, vocabulary: int, hidden: int, layers: int, kept: int) -> None:
        super().__init__()
        self.kept = kept
        self.embedding = nn.Embedding(vocabulary, kept)
        self.layers = nn.ModuleList(nn.LSTM(kept, hidden) for _ in range(layers))
        self.decoder = nn.Linear(kept, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        for layer in self.layers:
            x = layer(x)[0][..., : self.kept]
        return self.decoder(x).flatten(0, 1)


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

    def loss_and_gradients(self) -> Tensor:
        """Draw the patterns, run forward and backward."""
        if self.report is not None:
            resample(self.model)
        x, y = self.workload.batch
        loss = F.cross_entropy(self._forward(x), y)
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        """The whole step: draw, forward, loss, backward, clipping if any, optimizer."""
        self.optimizer.zero_grad()
        self.loss_and_gradients()
        if self.workload.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.workload.clip)
        self.optimizer.step()


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

    Raises:
        AssertionError: They differ by more than rounding does.
    """
    step = copy.deepcopy(step)
    nothing_is_masked = {"min_hidden": 0, "min_multiplies": 0}
    reference = contender(
        step.workload, step.name, rate, seed, **options | {"backend": "reference"} | nothing_is_masked
    )
    for _ in range(2):
        for one in (step, reference):
            one.optimizer.zero_grad()
        losses = [one.loss_and_gradients() for one in (step, reference)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
        for (key, found), wanted in zip(step.model.named_parameters(), reference.model.parameters(), strict=True):
            assert found.grad is not None and wanted.grad is not None, f"{step.name}: {key} has no gradient"
            error = (found.grad - wanted.grad).norm() / wanted.grad.norm()
            if not error < 5e-3:  # rounding turns some ReLUs on or off
                raise AssertionError(f"{step.name}: the gradient of {key} is off by {error:.1%} of its norm")
