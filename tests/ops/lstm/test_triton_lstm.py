"""The LSTM recurrence with Triton kernels, in the interpreter; and contiguous weights for the vendor's kernel."""

import pytest
import torch
from support.triton_cases import TYPES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from approxdrop_lightning import RowPattern, functional
from approxdrop_lightning.ops.lstm import compact as lstm
from approxdrop_lightning.ops.lstm import lstm_ops
from approxdrop_lightning.ops.lstm.flat_weights import flat_weights

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poisoned")]
#: A few steps of values below 1; half precision rounds each of them to 5e-4.
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}
NAMES = ("h", "h_T", "c_T", "gates", "h0", "c0", "weight_hh")


@pytest.fixture
def kernels(monkeypatch):
    """Run the kernels for all supported types, as on CUDA."""
    monkeypatch.setattr("approxdrop_lightning.ops.lstm._has_kernels", lambda gates: gates.dtype != torch.float64)


def operands(steps, batch, hidden, dtype=torch.float32):
    shapes = (steps, batch, 4 * hidden), (batch, hidden), (batch, hidden), (4 * hidden, hidden)
    scales = (1, 1, 1, hidden**-0.5)
    return [
        (torch.randn(shape) * scale).to(dtype).requires_grad_() for shape, scale in zip(shapes, scales, strict=True)
    ]


def outputs_and_gradients(tensors, pattern, directions):
    found = functional.lstm_sequence(*tensors, pattern, 1.5)
    return *found, *torch.autograd.grad(found, tensors, directions)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dp", [None, *range(1, 9)])
@pytest.mark.parametrize(
    ("steps", "batch", "hidden"),
    [(1, 1, 1), (3, 2, 7), (2, 5, 33), (4, 1, 130), (2, 2, 300)],  # one unit, odd, more than a block
)
def test_sequence_is_the_plain_one(steps, batch, hidden, dp, dtype):
    """The reference in double precision on the same numbers; its own tests compare it with ``nn.LSTM``."""
    pattern = None if dp is None else RowPattern(hidden, dp, int(torch.randint(dp, ())), keep=max(1, dp // 3))
    tensors = operands(steps, batch, hidden, dtype)
    directions = [torch.randn(s).to(dtype) for s in ((steps, batch, hidden), (batch, hidden), (batch, hidden))]
    found = outputs_and_gradients(tensors, pattern, directions)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = outputs_and_gradients(exact, pattern, [d.double() for d in directions])
    for name, mine, theirs in zip(NAMES, found, wanted, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs, **TOLERANCE[dtype], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradients_of_outputs_that_are_not_used(used):
    """The other outputs receive no gradient, not even zeros."""
    tensors, kept = operands(3, 2, 9), torch.tensor([0, 4, 5])
    weight = tensors[3][:, kept].detach().requires_grad_()
    inputs = (*tensors[:3], weight)
    gradients = [
        torch.autograd.grad(f(*inputs, kept)[used].sum(), inputs) for f in (lstm_ops.sequence, lstm.sequence)
    ]
    for name, mine, theirs in zip(NAMES[3:], *gradients, strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE[torch.float32], msg=lambda m, n=name: f"{n}: {m}")


def test_gates_by_batch_first():
    """Strided steps and gradients of a transposed output are read without a copy."""
    gates, h0, c0, weight = operands(3, 2, 9)
    swapped = gates.detach().transpose(0, 1).contiguous().requires_grad_()
    direction = torch.randn(2, 3, 9)
    y = lstm_ops.sequence(swapped.transpose(0, 1), h0, c0, weight, None)[0].transpose(0, 1)
    wanted = lstm.sequence(gates, h0, c0, weight, None)[0].transpose(0, 1)
    torch.testing.assert_close(y, wanted, **TOLERANCE[torch.float32])
    (mine,), (theirs,) = torch.autograd.grad(y, swapped, direction), torch.autograd.grad(wanted, gates, direction)
    torch.testing.assert_close(mine.transpose(0, 1), theirs, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("kept", [None, [1, 4, 6]])
def test_operators_keep_their_promises(kept):
    gates, h0, c0, weight = operands(3, 2, 7)
    if kept is not None:
        kept = torch.tensor(kept)
        weight = weight[:, kept].detach().requires_grad_()
    torch.library.opcheck(lstm_ops._sequence.op, (gates, h0, c0, weight, kept))
    acts, c, dh, state = torch.rand(3, 2, 28), torch.randn(4, 2, 7), torch.randn(3, 2, 7), torch.randn(2, 7)
    for incoming in ((dh, state, state), (None, None, None)):
        torch.library.opcheck(lstm_ops._sequence_backward.op, (*incoming, acts, c, weight.detach(), kept))


def test_compiled_as_one_graph():
    torch._dynamo.reset()
    tensors = operands(3, 2, 7)
    compiled = torch.compile(lstm_ops.sequence, backend="aot_eager", fullgraph=True)
    found = compiled(*tensors, None)
    wanted = lstm.sequence(*tensors, None)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float32])


def test_products_are_counted():
    gates, h0, c0, weight = operands(3, 2, 8)
    with FlopCounterMode(display=False) as counter:
        weight = weight[:, :4]
        lstm_ops.sequence(gates, h0, c0, weight, torch.arange(4))[0].sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (3 * 2) * 32 * 4  # forward, backward, gradient of the weight


def test_autocast_casts_and_gradients_come_back():
    tensors = operands(3, 2, 8)
    with torch.autocast(torch.get_default_device().type, torch.float16):
        y = lstm_ops.sequence(*tensors, None)[0]
    assert y.dtype == torch.float16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), tensors))


def test_double_precision_is_refused():
    with pytest.raises(ValueError, match="float32, float16 and bfloat16, got torch.float64"):
        lstm_ops.sequence(*operands(1, 1, 2, torch.float64), None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept", [None, [0, 3, 4]])
def test_flat_weights_in_the_vendor_kernel(kept, bias):
    kept = None if kept is None else torch.tensor(kept)
    lstm_layer = nn.LSTM(6, 5, bias=bias)
    weights = list(lstm_layer.parameters())
    x, state = torch.randn(4, 2, 6 if kept is None else 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    flat = flat_weights(kept, *weights)
    plain = [weights[0] if kept is None else weights[0][:, kept], *weights[1:]]
    outputs = [torch._VF.lstm(x, state, list(w), bias, 1, 0.0, True, False, False)[0] for w in (flat, plain)]
    direction = torch.randn(4, 2, 5)
    torch.testing.assert_close(*outputs)
    for mine, theirs in zip(*(torch.autograd.grad(y, weights, direction) for y in outputs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_flat_weights_lie_as_cudnn_wants_them():
    """Contiguous from the start of one storage, in the vendor's order: ``w_ih, w_hh, b_ih, b_hh``."""
    weights = list(nn.LSTM(6, 5).parameters())
    flat = flat_weights(torch.tensor([0, 3, 4]), *weights)
    assert [tuple(part.shape) for part in flat] == [(20, 3), (20, 5), (20,), (20,)]
    assert len({part.untyped_storage().data_ptr() for part in flat}) == 1
    assert [part.storage_offset() for part in flat] == [0, 60, 160, 180]
    assert all(part.is_contiguous() for part in flat)
