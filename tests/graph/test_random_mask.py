import pytest
import torch
from support.compiled import equals_masks, rewriting
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from approxdrop_lightning import approximate, resample, restore
from approxdrop_lightning.graph import random_mask
from approxdrop_lightning.graph.counts import COUNTS

pytestmark = pytest.mark.usefixtures("fresh_compiler")
ROWS, WIDTH, HIDDEN = 256, 256, 512
RANDOM_MASK = torch.ops.approxdrop.random_mask.default


class Block(nn.Module):
    """One dropout that skips, and two of equal size that stay conventional, because sums read them whole."""

    def __init__(self, hidden=HIDDEN, checkpointed=False):
        super().__init__()
        self.first = nn.Dropout(0.3)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.inner, self.last = nn.Dropout(0.5), nn.Dropout(0.3)
        self.checkpointed = checkpointed

    def feed_forward(self, x):
        return self.last(self.down(self.inner(self.up(x).relu())))

    def forward(self, x):
        dropped = self.first(x)
        x = x + dropped
        y = checkpoint(self.feed_forward, x, use_reentrant=False) if self.checkpointed else self.feed_forward(x)
        return dropped, y, x + y


def kept(rate, number=0, size=1 << 20):
    return random_mask._random_mask([size], rate, number)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.75])
def test_a_mask_keeps_each_value_independently_with_the_rate(rate):
    """A million values: the share, and that of pairs of neighbours, within 5 standard deviations (2e-6 in all)."""
    torch.manual_seed(0)
    mask, share = kept(rate), 1 - rate
    both = mask[1:] & mask[:-1]
    for found, expected in ((mask, share), (both, share**2)):
        deviation = (expected * (1 - expected) / len(found)) ** 0.5
        assert abs(found.double().mean().item() - expected) < 5 * deviation * (1 if found is mask else 2)


def test_masks_follow_the_generator_of_pytorch():
    torch.manual_seed(4)
    first, second = kept(0.5), kept(0.5)
    torch.manual_seed(4)
    assert torch.equal(first, kept(0.5)) and torch.equal(second, kept(0.5)) and not torch.equal(first, second)
    torch.library.opcheck(
        RANDOM_MASK, ([3, 5], 0.3, 0), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


def captured(model, x, masks):
    """Capture a step; the targets of its graphs, among which are so many random masks."""
    targets = []

    def backend(gm, inputs):
        result = rewriting(gm, inputs)
        graphs = [gm, *(child for child in gm.children() if isinstance(child, torch.fx.GraphModule))]
        targets.extend(node.target for graph in graphs for node in graph.graph.nodes)
        return result

    report = approximate(model, seed=0)
    resample(model)
    torch.compile(model, backend=backend)(x)[-1].sum().backward()
    restore(model)
    assert targets.count(RANDOM_MASK) == masks and counters["stats"]["unique_graphs"] == 1
    return report


def test_native_dropouts_beside_one_that_skips_read_masks():
    report = captured(Block(), torch.randn(ROWS, WIDTH), masks=2)
    assert [row.skipped.startswith("nothing") for row in report] == [True, False, True]
    assert (COUNTS.producers, COUNTS.consumers, COUNTS.native) == (1, 1, 2)


def test_small_dropouts_and_checkpointed_blocks_and_graphs_that_skip_nothing_stay_as_they_are():
    captured(Block(hidden=4096), torch.randn(32, WIDTH), masks=0)  # 8,192 values
    torch.compiler.reset()
    counters.clear()
    captured(Block(checkpointed=True), torch.randn(ROWS, WIDTH), masks=0)
    torch.compiler.reset()
    counters.clear()
    report = captured(Block(hidden=8), torch.randn(ROWS, WIDTH), masks=0)
    assert all(row.skipped.startswith("nothing") for row in report)


def test_outputs_and_gradients_equal_the_masked_model():
    model = Block().double()
    model.forward = lambda x: Block.forward(model, x)[2]
    largest, report = equals_masks(model, torch.randn(ROWS, WIDTH).double(), steps=2, min_gain=None)
    assert largest < 1e-12 and report[1].skipped == "producer's rows and consumers' columns"


def test_generated_code_drops_differently_in_each_call_and_in_the_same_way_backward():
    """Two masks of equal size in a graph, and two steps; shares of 65,536 values within .01 (5 deviations)."""
    model = Block()
    approximate(model, seed=0)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(ROWS, WIDTH, requires_grad=True)
    dropped = []
    for _ in range(2):
        resample(model)
        first, last, _ = compiled(x)
        (grad,) = torch.autograd.grad(first.sum(), x)
        assert torch.allclose(grad, (first != 0) / 0.7) and torch.allclose(first[first != 0], x[first != 0] / 0.7)
        dropped += [first == 0, last == 0]
    restore(model)
    for mask in dropped:
        assert mask.double().mean().item() == pytest.approx(0.3, abs=0.01)
    for i, one in enumerate(dropped):
        for other in dropped[:i]:
            assert (one & other).double().mean().item() == pytest.approx(0.09, abs=0.01)
