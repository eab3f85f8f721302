"""Derivatives of the derivative, and the transforms of ``torch.func``: those of the masked model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.gallery import GALLERY
from support.twin import twin
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from approxdrop_lightning import approximate, functional, resample
from approxdrop_lightning.layers import ApproxLinear, Site
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.tile import TilePattern

ALL = {"min_gain": 0, "pattern_everywhere": True}
SETTINGS = {
    "row": {},
    "shared": {"interleave": False},
    "recurrent": {"recurrent": True},
    "masked before an LSTM": {"min_hidden": 1000},
    "tile": {"pattern": "tile", "tile_size": 2},
}
#: A function with a derivative of its own has no second one, re-entrant checkpointing none either.
ONCE = ("custom functions",)


def converted(name: str, setting: str):
    torch.manual_seed(0)
    make, make_input = GALLERY[name]
    model, x = make().double(), make_input()
    x = x.double() if x.is_floating_point() else x
    stock = copy.deepcopy(model)
    report = approximate(model, seed=1, **ALL | SETTINGS[setting])
    resample(model)
    return model, stock, x, report


def gradient_penalty(model: nn.Module, x: torch.Tensor):
    """As of WGAN-GP, or of MAML: a loss that is made of gradients."""
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    out = model(x) * 1.0
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    inputs = [*model.parameters(), *([x] if x.is_floating_point() else [])]
    gradients = torch.autograd.grad((out * direction).sum(), inputs, create_graph=True, allow_unused=True)
    penalty = sum((1 + g.square()).sqrt().sum() for g in gradients if g is not None)
    (penalty + out.square().sum()).backward()
    return [penalty.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", [name for name in GALLERY if name not in ONCE])
def test_second_derivatives_are_those_of_the_masked_model(name, setting):
    model, stock, x, report = converted(name, setting)
    with sdpa_kernel(SDPBackend.MATH):  # the other one has no second derivative
        found = gradient_penalty(model, x)
        masked = twin(stock, report)
        expected = gradient_penalty(masked, x)
    keys = [key.replace("lstm.lstm.", "lstm.") for key, _ in masked.named_parameters()]
    mine = dict(zip([key for key, _ in model.named_parameters()], found[1:], strict=False))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-9)
    for key, gradient in zip(keys, expected[1:], strict=False):
        torch.testing.assert_close(mine[key], gradient, rtol=0, atol=1e-8, msg=key)
    if x.is_floating_point():
        torch.testing.assert_close(found[-1], expected[-1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("setting", ["row", "recurrent"])
@pytest.mark.parametrize("name", [name for name in GALLERY if name not in (*ONCE, "backward hooks")])
def test_torch_func_grad_is_that_of_the_masked_model(name, setting):
    model, stock, x, report = converted(name, setting)
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def loss(parameters, of):
        return torch.func.functional_call(of, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, model)
    assert any(row.site.last_patterns for row in report if row.site)
    masked = twin(stock, report)
    names = {key.replace("lstm.lstm.", "lstm."): key for key, _ in masked.named_parameters()}
    expected = torch.func.grad(loss)({names[key]: value for key, value in parameters.items()}, masked)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[names[key]], rtol=0, atol=1e-9, msg=key)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3)

    def forward(self, x):
        return self.down(self.drop(torch.tanh(self.up(x))))


def masked_net(model, x, mask):
    return model.down(torch.tanh(model.up(x)) * mask * 2)


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net().double()
    report = approximate(model, seed=0, **ALL)
    resample(model)
    return model, report["drop"].site, torch.randn(5, 6, dtype=torch.float64)


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_gradients_of_each_sample(net, randomness):
    """Samples have masks of their own where each is to have one, else the same."""
    model, site, x = net
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0), randomness=randomness)(parameters, x)
    (pattern,) = site.last_patterns
    masks = pattern.mask(5) if randomness == "different" else pattern.mask().expand(5, 16)
    assert (len(masks.unique(dim=0)) > 1) == (randomness == "different")
    for i, (sample, mask) in enumerate(zip(x, masks.double(), strict=True)):
        model.zero_grad()
        masked_net(model, sample, mask).square().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(found[key][i], parameter.grad, rtol=0, atol=1e-12)


def test_jvp_of_both_kinds_and_jacobians(net):
    model, site, x = net
    tangent = torch.randn_like(x)
    value, found = torch.func.jvp(model, (x,), (tangent,))
    mask = site.last_patterns[-1].mask(5).double()
    expected = torch.func.jvp(lambda x: masked_net(model, x, mask), (x,), (tangent,))
    torch.testing.assert_close((value, found), expected)
    resample(model)
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(x, tangent))
        found = torch.autograd.forward_ad.unpack_dual(out).tangent
    mask = site.last_patterns[-1].mask(5).double()
    torch.testing.assert_close(found, torch.func.jvp(lambda x: masked_net(model, x, mask), (x,), (tangent,))[1])
    for vectorize in (False, True):  # of many gradients in one backward pass, which is batched
        resample(model)
        found = torch.autograd.functional.jacobian(lambda x: model(x) * 1.0, x, vectorize=vectorize)
        mask = site.last_patterns[-1].mask(5).double()
        expected = torch.autograd.functional.jacobian(lambda x, mask=mask: masked_net(model, x, mask), x)
        torch.testing.assert_close(found, expected)
    assert isinstance(model.up, ApproxLinear) and isinstance(site, Site) and site.consumers  # by the last one


def test_a_hessian(net):
    model, site, x = net
    found = torch.autograd.functional.hessian(lambda x: model(x).square().sum() * 1.0, x)
    mask = site.last_patterns[-1].mask(5).double()
    expected = torch.autograd.functional.hessian(lambda x: masked_net(model, x, mask).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_tiles_under_transforms_drop_units():
    """Transforms see plain tensors only, which carry no mark."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).double()
    report = approximate(model, seed=0, pattern="tile", tile_size=2, **ALL)
    resample(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    found = torch.func.grad(lambda x: model(x).square().sum())(x)
    (units,) = report["0"].site.last_patterns
    expected = torch.func.grad(lambda x: model[1](x * units.mask() * 2).square().sum())(x)
    torch.testing.assert_close(found, expected)


OPS = {
    "pack": lambda x, w, b: functional.pack(x, PATTERN),
    "unpack": lambda x, w, b: functional.unpack(x.flatten()[:32], PATTERN, (8,)),
    "rows out": lambda x, w, b: functional.row_linear(x, w, b, None, RowPattern(6, 2, 1, interleave=True)),
    "rows in": lambda x, w, b: functional.row_linear(x.flatten()[:32], w, b, PATTERN, leading_shape=(8,), scale=2.0),
    "columns": lambda x, w, b: functional.select_columns(w, RowPattern(8, 2, 1)),
    "tiles": lambda x, w, b: functional.tile_linear(x, w, b, TilePattern(6, 8, 2, 0, 1, 2), 2.0),
}
PATTERN = RowPattern(8, 2, 1, interleave=True)


@pytest.mark.parametrize("name", list(OPS))
def test_functions_can_be_differentiated_again_and_transformed(name):
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((8, 8), (6, 8), (6,))]

    def run(*inputs):
        return OPS[name](*inputs).tanh()

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    gradients = torch.autograd.grad(run(*inputs).sum(), inputs, allow_unused=True, materialize_grads=True)
    found = torch.func.grad(lambda inputs: run(*inputs).sum())(tuple(t.detach() for t in inputs))
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_compiled_recurrence_says_that_it_has_one_derivative():
    gates, state = torch.randn(3, 2, 16, requires_grad=True), torch.zeros(2, 4)
    h, _, _ = functional.lstm_sequence(gates, state, state, torch.randn(16, 4))
    (grad,) = torch.autograd.grad(F.silu(h).sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
