"""Products with kept tiles against the masked dense definition: outputs and every gradient, ragged shapes."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from approxdrop_lightning import TilePattern, functional
from approxdrop_lightning.ops.native import copies, product
from approxdrop_lightning.ops.native import library as native

SIZES = (1, 7, 31, 33, 130)  # one unit, less than a tile, one less and one more, several tiles and a remainder


@pytest.fixture(params=["compiled", "plain"])
def kernels(request, monkeypatch):
    """With and without the compiled copies and products (float32)."""
    if request.param == "plain":
        for module in (copies, product):
            monkeypatch.setattr(module, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler on this machine")


def masked_linear(x, weight, bias, pattern, scale):
    """The definition, written out."""
    y = scale * (x @ (weight * pattern.mask()).T)
    return y if bias is None else y + bias


def compare(x, weight, bias, pattern, scale, backend, atol):
    inputs = [t for t in (x, weight, bias) if t is not None]
    found = functional.tile_linear(x, weight, bias, pattern, scale, backend)
    expected = masked_linear(x, weight, bias, pattern, scale)
    direction = torch.randn_like(expected)
    pairs = [(found, expected)]
    pairs += zip(*(torch.autograd.grad(y, inputs, direction) for y in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.usefixtures("poisoned", "kernels")
@pytest.mark.parametrize(
    ("backend", "dtype", "atol"),
    [
        ("compact", torch.float64, 1e-9),
        ("reference", torch.float64, 1e-9),
        ("compact", torch.float32, 2e-4),  # sums of up to 130 products of normal deviates, in another order
    ],
)
@pytest.mark.parametrize("n_out", SIZES)
@pytest.mark.parametrize("n_in", SIZES)
def test_tile_linear_is_the_masked_product(n_in, n_out, backend, dtype, atol):
    torch.manual_seed(0)
    cases = itertools.product(range(1, 9), [(5,), (2, 3), (1,), (0,), ()])
    for number, (dp, leading) in enumerate(cases):
        keep, offset, tile_size = 1 + number % dp, number % dp, (32, 8)[number % 2]
        pattern = TilePattern(n_out, n_in, dp, offset, keep, tile_size)
        shapes = ((*leading, n_in), (n_out, n_in), (n_out,))
        x, weight, bias = (torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)
        compare(x, weight, bias if number % 3 else None, pattern, 1.0 if number % 5 else 2.0, backend, atol)


@pytest.mark.parametrize("backend", ["compact", "reference"])
@pytest.mark.parametrize(("dp", "keep"), [(2, 1), (3, 2), (5, 3)])
def test_gradcheck(dp, keep, backend):
    torch.manual_seed(0)
    pattern = TilePattern(5, 7, dp, 1, keep, tile_size=2)
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 7), (5, 7), (5,))]
    assert torch.autograd.gradcheck(lambda *t: functional.tile_linear(*t, pattern, 1.5, backend), tensors)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_only_the_gradients_asked_for(wanted):
    pattern = TilePattern(6, 8, 2, 0, tile_size=2)
    tensors = [torch.randn(s, requires_grad=w) for s, w in zip(((3, 8), (6, 8), (6,)), wanted, strict=True)]
    functional.tile_linear(*tensors, pattern).sum().backward()
    assert tuple(t.grad is not None for t in tensors) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_strides(dtype):
    torch.manual_seed(0)
    pattern = TilePattern(70, 40, 3, 2, 2, tile_size=8)
    x = torch.randn(40, 9, dtype=dtype).t()
    weight = torch.randn(70, 80, dtype=dtype)[:, ::2].requires_grad_()
    found = functional.tile_linear(x, weight, None, pattern)
    expected = F.linear(x, weight * pattern.mask())
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.sum(), weight)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["compact", "reference"])
def test_autocast_casts_as_for_a_linear_layer(backend):
    x, weight, bias = torch.randn(3, 8), torch.randn(6, 8, requires_grad=True), torch.randn(6)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.tile_linear(x, weight, bias, TilePattern(6, 8, 2, 0, tile_size=2), backend=backend)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_compact_multiplies_only_what_is_kept():
    from torch.utils.flop_counter import FlopCounterMode

    pattern = TilePattern(96, 128, 4, 3, tile_size=8)
    x, weight = torch.randn(10, 128, requires_grad=True), torch.randn(96, 128, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        functional.tile_linear(x, weight, None, pattern).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 96 * 128 / 4


@pytest.mark.parametrize(
    ("shapes", "backend", "message"),
    [
        (((3, 8), (8, 6), None), "auto", r"tile_linear: the pattern is of a weight \[6, 8\], got shape \(8, 6\)"),
        (((3, 8), (6, 8), (5,)), "auto", r"tile_linear: bias must be \[6\], got shape \(5,\)"),
        (((3, 7), (6, 8), None), "auto", r"tile_linear: x must be \[\.\.\., 8\], got shape \(3, 7\)"),
        (((), (6, 8), None), "auto", r"tile_linear: x must be \[\.\.\., 8\], got shape \(\)"),
        (((3, 8), (6, 8), None), "cuda", "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(shapes, backend, message):
    x, weight, bias = (None if s is None else torch.randn(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        functional.tile_linear(x, weight, bias, TilePattern(6, 8, 2, 0), backend=backend)
