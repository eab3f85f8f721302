"""Which steps are captured and replayed, and that both equal the eager step; with a fake capture."""

import copy

import pytest
import torch
from support.fake_capture import FakeCapture
from support.skipping import set_thresholds
from torch import nn

from approxdrop_lightning.policy import THRESHOLDS
from approxdrop_lightning.step_graphs import StepGraphs, split_tensors


def training(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)

    def step(inputs):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(inputs[0]), inputs[1])
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    return net, optimizer, step


def batches(count, rows=5):
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator)]
        for _ in range(count)
    ]


def test_replayed_steps_are_the_steps():
    net, optimizer, step = training()
    plain, _, plain_step = training()
    capture = FakeCapture(net, optimizer)
    graphs = StepGraphs(capture, warmup=2)
    for number, batch in enumerate(batches(8)):
        wanted = plain_step(batch)["loss"]
        found = graphs.run(None, batch, step)["loss"].clone()
        torch.testing.assert_close(found, wanted, msg=lambda m, n=number: f"step {n}: {m}")
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert (graphs.counts.warmed_up, graphs.counts.replayed, graphs.counts.eager) == (2, 6, 0)
    assert capture.recorded == len(graphs) == 1


def test_each_shape_and_key_has_its_graph():
    _, _, step = training()
    graphs = StepGraphs(FakeCapture(), warmup=1)
    small, large = batches(1, 2)[0], batches(1, 5)[0]
    for key, batch in [
        (1, large),
        (1, large),
        (2, large),
        (2, large),
        (1, small),
        (1, small),
        (1, large),
        (2, large),
    ]:
        graphs.run(key, batch, step)
    assert len(graphs) == 3
    assert (graphs.counts.warmed_up, graphs.counts.replayed) == (3, 5)


def test_a_last_smaller_batch_is_eager_until_it_comes_often_enough():
    _, _, step = training()
    graphs = StepGraphs(FakeCapture(), warmup=3)
    for _ in range(2):  # epochs
        for batch in [*batches(6), *batches(1, 2)]:
            graphs.run(None, batch, step)
    assert (graphs.counts.warmed_up, graphs.counts.replayed, len(graphs)) == (3 + 2, 9, 1)


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_why():
    net, optimizer, step = training()
    capture = FakeCapture(net, optimizer)

    def reads(inputs):
        if capture.recording:
            raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")
        return step(inputs)

    plain, _, plain_step = training()
    graphs = StepGraphs(capture, warmup=1)
    for batch in batches(4):
        torch.testing.assert_close(graphs.run(None, batch, reads)["loss"], plain_step(batch)["loss"])
    torch.testing.assert_close(net[0].weight, plain[0].weight)
    assert (graphs.counts.replayed, graphs.counts.eager, len(graphs)) == (0, 3, 0)
    reason = "the capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert graphs.counts.reasons == {reason: 3}
    assert str(graphs.counts) == f"0 steps replayed, 1 to warm up, 3 eager\n  3 eager: {reason}"


def test_no_more_graphs_than_allowed():
    _, _, step = training()
    graphs = StepGraphs(FakeCapture(), warmup=1, max_graphs=2)
    for key in range(4):
        for batch in batches(3):
            graphs.run(key, batch, step)
    assert (len(graphs), graphs.counts.replayed, graphs.counts.eager) == (2, 4, 4)
    assert list(graphs.counts.reasons) == ["more than 2 combinations of shapes and settings"]


@pytest.mark.parametrize("arguments", [{"warmup": 0}, {"max_graphs": 0}])
def test_mistakes_are_named(arguments):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))} must be at least 1, got 0"):
        StepGraphs(FakeCapture(), **arguments)


def test_batches_of_any_nesting():
    x, y = torch.ones(2), torch.zeros(3)
    batch = {"x": x, "more": (y, "name", 3)}
    tensors, key, put = split_tensors(batch)
    assert [id(t) for t in tensors] == [id(x), id(y)]
    other = put([y, x])
    assert other["x"] is y
    assert other["more"] == (x, "name", 3)
    assert split_tensors(copy.deepcopy(batch))[1] == key
    assert split_tensors({"x": x, "more": (y, "name", 4)})[1] != key
    with pytest.raises(TypeError, match="unhashable"):
        split_tensors((x, {1, 2}))


def test_the_policy_knows_what_is_to_be_replayed(monkeypatch):
    """The host's part of skipping counts in a step of its own, and not in one that is replayed."""
    set_thresholds(monkeypatch, saved_compiled=10, saved_replayed=5)
    asked = []

    def step(inputs):
        asked.append(THRESHOLDS["cpu"].compiled(7))
        return inputs[0]

    graphs = StepGraphs(FakeCapture(), warmup=1)
    graphs.run(None, [torch.zeros(1)], step)
    assert asked == [None]
    assert THRESHOLDS["cpu"].compiled(7) is not None
