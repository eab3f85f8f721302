"""Pooled buffers: reused only when nothing refers to them, and freed when idle."""

import pytest
import torch

from approxdrop_lightning.ops.native import buffers


def test_a_buffer_of_a_size_that_does_not_vary_is_not_rounded_up():
    buffers.free_buffers()
    like = torch.empty(0)
    assert buffers.buffer((1001, 1003), like).untyped_storage().nbytes() > 4 * 1001 * 1003
    assert buffers.buffer((1001, 1003), like, exact=True).untyped_storage().nbytes() == 4 * 1001 * 1003
    buffers.free_buffers()


@pytest.mark.parametrize("options", [{}, {"interleave": False}, {"pattern": "tile"}])
def test_what_others_free_is_not_kept(options):
    """The loss copies the logits of a large vocabulary, so pooling them would hold them twice."""
    from torch import nn

    from approxdrop_lightning import approximate, resample

    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 8000))
    approximate(model, seed=0, min_gain=0, **options)
    buffers.free_buffers()
    resample(model)
    logits = model(torch.randn(100, 32))
    assert 4 * logits.numel() > buffers._KEEP_FROM_BYTES
    held = [entry for entries in buffers._pool.storages.values() for entry in entries]
    assert logits.untyped_storage().data_ptr() not in [entry.storage.data_ptr() for entry in held]


def test_a_buffer_is_not_handed_out_while_somebody_holds_a_view_of_it():
    like = torch.empty(0)
    first = buffers.buffer((800, 800), like)
    view, address = first[3:5], first.data_ptr()
    assert buffers.buffer((800, 800), like).data_ptr() != address
    del first
    assert buffers.buffer((800, 800), like).data_ptr() != address
    del view
    again = buffers.buffer((800, 800), like)
    assert again.data_ptr() == address
    assert buffers.buffer((800, 800), like).data_ptr() != address
    buffers.free_buffers()
    again.fill_(1.0)  # its memory is still its own


def test_buffers_of_many_sizes_do_not_pile_up():
    """Sizes vary from step to step, because kept shares do."""
    buffers.free_buffers()
    like = torch.empty(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        height = int(torch.randint(400, 4000, (), generator=generator))
        assert buffers.buffer((height, 700), like).shape == (height, 700)
    held = sum(len(entries) * size for size, entries in buffers._pool.storages.items())
    assert held < 40 * 4 * 700 * 4000  # of 3,600 sizes: eight for each doubling, and one at a time
    for _ in range(buffers._IDLE_REQUESTS + 1):
        buffers.buffer((700, 1000), like)
    buffers.buffer((20000, 1000), like)  # a new one, which frees idle ones
    assert sum(len(entries) for entries in buffers._pool.storages.values()) == 2
    buffers.free_buffers()


def test_a_gradient_that_is_kept_is_not_written_again():
    """The optimizer drops gradients after each step; somebody who keeps one must find it unchanged."""
    from support.skipping import assert_skips
    from torch import nn

    from approxdrop_lightning import approximate, resample

    model = nn.Sequential(nn.Linear(800, 800), nn.Dropout(0.5), nn.Linear(800, 800))
    report = approximate(model, seed=0, min_gain=0)
    kept = []
    for _ in range(4):
        resample(model)
        model.zero_grad()
        model(torch.randn(32, 800)).square().sum().backward()
        kept.append([(p.grad, p.grad.clone()) for p in model.parameters()])
    assert_skips(report)
    for pairs in kept:
        assert all(torch.equal(a, b) for a, b in pairs)
