"""Training loops as users write them, step by step the same as those of the masked model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.skipping import assert_skips
from support.twin import Masks, twin
from torch import Tensor, nn
from torch.func import functional_call

from approxdrop_lightning import approximate, resample

SETTINGS = {"row": {}, "shared": {"interleave": False}, "tile": {"pattern": "tile", "tile_size": 2}}


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def net() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(10, 32), nn.Tanh(), nn.Dropout(0.5)),
        *(nn.Linear(32, 16), nn.Tanh(), nn.Dropout(0.3)),
        nn.Linear(16, 3),
    )


def take_step(model: nn.Module, loss: Tensor) -> None:
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)


def accumulated(model: nn.Module, step: int) -> list[Tensor]:
    """Gradients of several batches of different sizes, clipped."""
    model.zero_grad()
    losses = []
    for rows in (4, 1, 7):
        losses.append(model(x(rows, 10)).square().mean())
        losses[-1].backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-0.1)
    return losses


def sharpness_aware(model: nn.Module, step: int) -> list[Tensor]:
    """Two passes per step, at different weights."""
    batch = x(5, 10)
    first = model(batch).square().mean()
    model.zero_grad()
    first.backward()
    moved = [p.grad * 0.05 for p in model.parameters()]
    for p, d in zip(model.parameters(), moved, strict=True):
        p.data += d
    second = model(batch).square().mean()
    model.zero_grad()
    second.backward()
    for p, d in zip(model.parameters(), moved, strict=True):
        p.data -= d
        p.data -= 0.1 * p.grad
    return [first, second]


def rollouts(model: nn.Module, step: int) -> list[Tensor]:
    """Samples drawn without gradients in training mode, then used twice."""
    with torch.no_grad():
        seen = [(batch, model(batch)) for batch in (x(5, 10), x(3, 10))]
    losses = []
    for _ in range(2):
        losses.append(sum((model(batch) - 0.5 * y).square().mean() for batch, y in seen))
        take_step(model, losses[-1])
    return losses


def gradient_penalty(model: nn.Module, step: int) -> list[Tensor]:
    """A loss on the gradient with regard to the input, then clipped weights."""
    batch = x(5, 10).requires_grad_()
    (gradient,) = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)
    loss = (gradient.norm(dim=1) - 1).square().mean() + model(x(5, 10)).mean()
    take_step(model, loss)
    for p in model.parameters():
        p.data.clamp_(-0.3, 0.3)
    return [loss, gradient]


def meta_learning(model: nn.Module, step: int) -> list[Tensor]:
    """The loss after a step on another batch, through that step."""
    weights = dict(model.named_parameters())
    inner = functional_call(model, weights, (x(5, 10),)).square().mean()
    gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    moved = {name: p - 0.1 * g for (name, p), g in zip(weights.items(), gradients, strict=True)}
    outer = functional_call(model, moved, (x(5, 10),)).square().mean()
    take_step(model, outer)
    return [inner, outer]


def kept_features(model: nn.Module, step: int) -> list[Tensor]:
    """Outputs that are logged and differentiated again after the update."""
    batch = x(5, 10)
    hidden = model[0](batch)
    active = model[1](hidden)
    out = model[3:](model[2](active))
    take_step(model, out.square().mean())
    return [out, hidden, active, torch.stack([hidden, active]), active.norm(dim=-1)]


def two_views(model: nn.Module, step: int) -> list[Tensor]:
    """Two passes over one batch, with a pattern of its own each, that are to agree."""
    batch = x(6, 10)
    first, second = model(batch).log_softmax(-1), model(batch).log_softmax(-1)
    loss = sum(F.kl_div(*pair, reduction="batchmean", log_target=True) for pair in ((first, second), (second, first)))
    take_step(model, loss + first[:, 0].mean())
    return [loss, first, second]


LOOPS = [accumulated, sharpness_aware, rollouts, gradient_penalty, meta_learning, kept_features, two_views]


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("loop", LOOPS)
def test_a_training_loop_is_that_of_the_masked_model(loop, setting):
    torch.manual_seed(0)
    model = net().double()
    stock = copy.deepcopy(model)
    report = approximate(model, seed=1, min_gain=0, pattern_everywhere=True, **SETTINGS[setting])
    masks = Masks(report)
    masked = twin(stock, report, masks)
    for step in range(3):
        resample(model)
        torch.manual_seed(step)
        found = [torch.as_tensor(value * 1.0).detach().clone() for value in loop(model, step)]
        masks.read()
        torch.manual_seed(step)
        expected = [value.detach() for value in loop(masked, step)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
        for mine, theirs in zip(model.parameters(), masked.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-8)
    assert_skips(report, everywhere=True)
