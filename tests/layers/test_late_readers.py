"""Outputs that somebody holds: what is asked of them later has the value and the gradient of the stock model."""

import copy

import pytest
import torch
from support.flops import Flops
from support.gallery import GALLERY
from support.twin import twin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from approxdrop_lightning import approximate, resample, restore
from approxdrop_lightning.layers import waiting
from approxdrop_lightning.layers.lazy_tensor import LazyTensor

ALL = {"min_gain": 0, "pattern_everywhere": True}
SETTINGS = {
    "row": {},
    "shared": {"interleave": False},
    "recurrent": {"recurrent": True},
    "tile": {"pattern": "tile", "tile_size": 2},
}


def outputs_of(model: nn.Module, run) -> tuple[dict[str, list[Tensor]], Tensor]:
    """The outputs of all modules of a model, by name, and that of the model, read."""
    kept: dict[str, list[Tensor]] = {}

    def keep(name):
        def hook(module, args, output):
            kept.setdefault(name.replace("lstm.lstm", "lstm"), []).append(
                output[0] if isinstance(output, tuple) else output
            )

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    out = run() * 1.0
    for handle in handles:
        handle.remove()
    return kept, out


def converted_and_masked(name: str, setting: str):
    torch.manual_seed(0)
    make, make_input = GALLERY[name]
    model, x = make().double(), make_input()
    x = x.double().requires_grad_() if x.is_floating_point() else x
    stock = copy.deepcopy(model)
    report = approximate(model, seed=1, **ALL | SETTINGS[setting])
    resample(model)
    found = outputs_of(model, lambda: model(x))
    masked = twin(stock, report)
    expected = outputs_of(masked, lambda: masked(x))
    pairs = [
        (f"{key} {use}", mine, theirs)
        for key, uses in expected[0].items()
        for use, (mine, theirs) in enumerate(zip(found[0].get(key, []), uses, strict=False))
        if theirs.requires_grad and mine.shape == theirs.shape
    ]
    return model, found[1], masked, expected[1], pairs, report


def assert_same(name: str, mine: Tensor | None, theirs: Tensor | None) -> None:
    if theirs is None:
        assert mine is None or not torch.as_tensor(mine * 1).any(), name
    else:
        assert mine is not None, f"{name}: no gradient"
        torch.testing.assert_close(
            torch.as_tensor(mine * 1), torch.as_tensor(theirs * 1), rtol=0, atol=1e-9, msg=name
        )


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", list(GALLERY))
def test_late_hooks_retained_gradients_and_autograd_grad_of_every_output(name, setting):
    model, out, masked, expected, pairs, _ = converted_and_masked(name, setting)
    assert any(isinstance(mine, LazyTensor) and (mine.is_lazy or setting == "tile") for _, mine, _ in pairs)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    loss, masked_loss = (out * direction).sum(), (expected * direction).sum()
    ways = {"retain_graph": True, "allow_unused": True}
    if name != "custom functions":  # one of them is re-entrant checkpointing, which refuses this
        theirs = torch.autograd.grad(masked_loss, [t for _, _, t in pairs], **ways)
        for (key, mine, _), gradient in zip(pairs, theirs, strict=True):
            assert_same(f"autograd.grad of {key}", *torch.autograd.grad(loss, mine, **ways), gradient)
    seen: list[dict[str, Tensor]] = [{}, {}]
    for i, key in ((i, key) for i in (0, 1) for key in range(len(pairs))):
        tensor = pairs[key][1 + i]
        tensor.retain_grad()
        tensor.register_hook(lambda g, i=i, key=key: seen[i].__setitem__(key, g.detach().clone()))
    loss.backward(), masked_loss.backward()
    assert set(seen[0]) >= set(seen[1])
    for i, (key, mine, theirs) in enumerate(pairs):
        assert_same(f"hook of {key}", seen[0].get(i), seen[1].get(i))
        assert_same(f"retained gradient of {key}", mine.grad, theirs.grad)
    gradients = dict(masked.named_parameters())
    for key, parameter in model.named_parameters():
        twin_key = next(k for k in gradients if k == key or k == key.replace("lstm.", "lstm.lstm."))
        assert_same(key, parameter.grad, gradients[twin_key].grad)


@pytest.mark.parametrize("name", list(GALLERY))
def test_what_is_held_over_an_update_keeps_its_value(name):
    """By ``.data``, which no version counter shows: as some training loops do, and those that clip weights."""
    model, out, _, _, pairs, report = converted_and_masked(name, "row")
    lazy = [mine for _, mine, _ in pairs if isinstance(mine, LazyTensor) and mine.is_lazy]
    assert lazy and any(row.site.skips for row in report if row.site)
    expected_values = [(key, theirs.detach().clone()) for key, _, theirs in pairs]
    out.sum().backward()
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    for (key, value), (_, mine, _) in zip(expected_values, pairs, strict=True):
        assert_same(f"value of {key}", mine, value)


#: What a backward pass computes the gradients of, given a model and its input, and how the weights are updated.
LOSSES = {
    "another forward pass": lambda model, x: model(x).square().sum(),
    "a detached head": lambda model, x: model[3](torch.randn(5, 160, dtype=x.dtype)).square().sum(),
}


def of_data(p):
    p.data.add_(p.grad)


def of_other_data(p):
    p.data = p.data + p.grad


@torch.no_grad()
def in_place(p):
    p.add_(p.grad)


@pytest.mark.parametrize("update", [of_data, of_other_data, in_place])
@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("grad", ["backward", "autograd.grad"])
@pytest.mark.parametrize("options", [{}, ALL, {"pattern": "tile"}])
def test_what_is_held_over_an_update_by_hand_keeps_its_value(options, grad, loss, update):
    """It is no part of the loss, and by default all of this network is too small to skip anything."""
    model = nn.Sequential(nn.Linear(6, 160), nn.ReLU(), nn.Dropout(0.5), nn.Linear(160, 3)).double()
    approximate(model, seed=0, **options)
    waited = False
    for _ in range(3):
        resample(model)
        x = torch.randn(5, 6, dtype=torch.float64)
        hidden = model[0](x)
        active = model[1](hidden)
        waited |= isinstance(active, LazyTensor) and active.is_lazy
        expected = nn.functional.linear(x, model[0].weight, model[0].bias).detach().clone()
        model.zero_grad()
        used = list(model.parameters()) if loss == "another forward pass" else list(model[3].parameters())
        value = LOSSES[loss](model, x)
        if grad == "backward":
            value.backward()
        else:
            for p, g in zip(used, torch.autograd.grad(value, used), strict=True):
                p.grad = g
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
            update(p)
        assert_same("active", active, expected.relu())
        assert_same("hidden", hidden, expected)
    assert waited or "pattern" in options
    restore(model)
    assert not any(p._backward_hooks for p in model.parameters())


def test_gradients_of_stock_layers_have_no_hook_of_ours():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
    approximate(model, seed=0)
    x, hooked = torch.randn(5, 6), []
    for _ in range(3):
        resample(model, x)
        model(x).sum().backward()
        hooked.append([bool(p._backward_hooks) for p in model.parameters()])
    assert hooked == [[True, False, True, False], [False] * 4, [False] * 4]


@pytest.mark.parametrize("used", [False, True])
def test_an_output_may_be_detached_in_place(used):
    """Which PyTorch refuses for views."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    approximate(model, seed=0, **ALL)
    resample(model)
    x = torch.randn(5, 6)
    hidden = model[0](x)
    if used:
        model[2](model[1](hidden))
    assert isinstance(hidden, LazyTensor) and hidden.is_lazy
    hidden.detach_()
    torch.testing.assert_close(hidden * 1.0, nn.functional.linear(x, model[0].weight, model[0].bias).detach())
    assert not (hidden * 1.0).requires_grad


class OfData(torch.optim.Optimizer):
    """Updates what no version counter watches."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad)


@pytest.mark.parametrize("optimizer", [OfData, lambda parameters: torch.optim.SGD(parameters, lr=0.1)])
def test_what_is_held_over_the_step_of_an_optimizer_keeps_its_value(optimizer):
    """The gradients are there before: no backward pass lies between the call and the update."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    approximate(model, seed=0, **ALL)
    updates, x = optimizer(model.parameters()), torch.randn(5, 6, dtype=torch.float64)
    for _ in range(2):
        resample(model)
        model(x).sum().backward()
        hidden = model[0](x)
        assert isinstance(hidden, LazyTensor) and hidden.is_lazy
        expected = nn.functional.linear(x, model[0].weight, model[0].bias).detach().clone()
        updates.step()
        assert_same("hidden", hidden, expected)
    assert waiting._optimizers is not None
    restore(model)
    assert waiting._optimizers is None  # nothing is left on other people's optimizers


def test_a_hook_may_change_the_gradient_of_dropped_units_too():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    stock = copy.deepcopy(model)
    approximate(model, seed=0, **ALL)
    resample(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    hidden = model[0](x)
    active = model[1](hidden)
    loss = model[3](model[2](active)).square().sum()
    mask = model[2].last_patterns[0].mask(5).double() * 2
    theirs = stock[0](x)
    stock_active = stock[1](theirs)
    stock_loss = stock[3](stock_active * mask).square().sum()
    for tensor in (active, stock_active):
        tensor.register_hook(lambda g: g + 1.0)
    for tensor in (hidden, theirs):
        tensor.register_hook(lambda g: g * 3.0)
    loss.backward(), stock_loss.backward()
    for mine, other in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-9)


def test_backward_to_inputs_that_are_held():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    approximate(model, seed=0, **ALL)
    resample(model)
    hidden = model[0](torch.randn(5, 6, dtype=torch.float64))
    out = model[3](model[2](model[1](hidden)))
    (expected,) = torch.autograd.grad((out * 1).sum(), hidden, retain_graph=True)
    (out * 1).sum().backward(inputs=[hidden], retain_graph=True)
    torch.testing.assert_close(hidden.grad, expected)
    hidden.grad = None
    with torch._C.DisableTorchFunctionSubclass():  # as those do who call the engine
        (out * 1).sum().backward(inputs=[hidden])
    torch.testing.assert_close(hidden.grad, expected)
    assert model[0].weight.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("pattern", ["row", "tile", "dropconnect"])
def test_a_checkpointed_segment_may_end_in_dropout(pattern, reentrant):
    def run(stock=None, units=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
        x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
        if units is not None:
            out = model[3](model[1](model[0](x)) * units)
        else:
            report = approximate(model, seed=0, pattern=pattern, tile_size=2, **ALL)
            resample(model)
            out = model[3](checkpoint(model[:3], x, use_reentrant=reentrant))
        out.square().sum().backward()
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        return gradients, None if units is not None else report["2"].site.last_patterns

    found, patterns = run()
    if pattern != "row" and not reentrant:
        return  # weights are dropped: compared in test_tile_layers.py
    units = patterns[0].mask(5).double() * 2 if pattern == "row" else patterns[0].mask().double() * 2
    expected, _ = run(units=units)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pattern", ["row", "tile"])
def test_an_input_changed_after_its_dropout_is_not_read_silently(pattern):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    approximate(model, seed=0, pattern=pattern, **ALL)
    resample(model)
    x = torch.randn(5, 6, requires_grad=True) * 1
    dropped = model[0](x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="0: its output is read for the first time after its input was changed"):
        model[1](dropped)


def test_outputs_that_nobody_holds_are_not_computed():
    """The first layer's kept units only, and nothing that outlives the step."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 8))
    approximate(model, seed=0, **ALL)
    for held, times in ((False, 1), (True, 2)):
        resample(model)
        with Flops() as counter:
            hidden = model[1](model[0](torch.randn(16, 8)))
            out = model[3](model[2](hidden))
            if not held:
                del hidden
            out.sum().backward()
        half = 2 * 16 * 8 * 64 // 2
        assert counter.total == 5 * half + (2 * half if times == 2 else 0)
