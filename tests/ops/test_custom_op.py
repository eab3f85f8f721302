"""Operators give the same results through the dispatcher and past it."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from approxdrop_lightning.ops import custom_op
from approxdrop_lightning.ops.tile_linear import tile_ops

pytestmark = pytest.mark.triton


def results(watched, dtype):
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((6, 32), (48, 32), (48,)))
    counter = FlopCounterMode(display=False)
    autocast = torch.autocast(x.device.type, dtype or torch.float16, enabled=dtype is not None)
    with autocast, counter if watched else contextlib.nullcontext():
        y = tile_ops._tile_linear(x, weight, bias, torch.tensor(1, dtype=torch.int32), 2, 1, 16, 1.5)
        grads = torch.autograd.grad(y.float().square().sum(), (x, weight, bias))
    assert counter.get_total_flops() == (3 * 2 * 6 * 48 * 16 if watched else 0)
    return y, *grads


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_same_results_through_the_dispatcher_and_past_it(dtype):
    found = []
    for watched in (True, False):
        torch.manual_seed(0)
        found.append(results(watched, dtype))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_who_looks_on():
    seen = []
    torch.func.vmap(lambda x: seen.append(custom_op._is_watched(())) or x)(torch.zeros(2))
    with FakeTensorMode():
        fake = torch.zeros(2)
        seen.append(custom_op._is_watched((torch.zeros(2),)))
    seen.append(custom_op._is_watched((1, fake)))
    assert seen == [True] * 3
    assert not custom_op._is_watched((torch.zeros(2), torch.nn.Parameter(torch.zeros(2)), None, 1))


def test_no_second_derivative():
    x, weight = torch.randn(6, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    y = tile_ops._tile_linear(x, weight, None, torch.tensor(1, dtype=torch.int32), 2, 1, 16, 1.5)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
