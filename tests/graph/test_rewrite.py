"""The pass on captured graphs, without a code generator: what is rewritten, and that it equals masks."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.compiled import OneFunction, converted, equals_masks, masking, results, rewriting, worst
from support.gallery import GALLERY
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from approxdrop_lightning import resample, restore
from approxdrop_lightning.graph.counts import COUNTS

SETTINGS = {
    "default": {},
    "paper": {"interleave": False, "shuffle": False, "keep": "one", "concentration": 0.0, "rate": 0.7},
    "interleaved regular, .7": {"shuffle": False, "rate": 0.7},
    ".3": {"rate": 0.3, "block_size": 1},
}
pytestmark = pytest.mark.usefixtures("fresh_compiler")

#: name -> producers, consumers, and packed dropouts that are also read dense (default setting).
FOUND = {
    "mlp": (2, 3, 0),
    "mlp sigmoid, batch of sequences": (2, 3, 0),
    "mlp gelu, one row": (2, 3, 0),
    "mlp, no batch": (2, 3, 0),
    "dropout object used twice": (2, 2, 0),
    "one layer, two sites of different rates": (2, 1, 1),
    "residual": (0, 2, 0),
    "in place": (1, 1, 0),
    "metric under no_grad": (0, 1, 0),  # what is dropped is read by the metric too
    "custom functions": (2, 1, 1),
    "query, key and value": (0, 3, 0),
    "convolutions before a head": (2, 2, 0),
    "transformer layers": (4, 2, 2),
    "transformer layers, norm first, batch first": (4, 2, 2),
    "towers side by side": (11, 11, 0),  # of four parts, a layer between two dropouts is four
    "towers side by side, of sequences": (11, 11, 0),
    "sums of layers": (2, 2, 0),
    "stacked": (15, 16, 0),  # nine towers, and three layers before each of the other dropouts
    "stacked, of sequences": (15, 16, 0),
    "torchvision MLP": (3, 2, 1),
    "torchvision MLPBlock": (2, 1, 1),
    "torchvision ViT": (4, 2, 2),
}
#: The stock model does not compile as a whole either, or fails in training.
BREAKS = {"backward hooks"} | {name for name in GALLERY if "lstm" in name}


def double(x):
    return x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("name", FOUND)
def test_the_gallery_equals_its_masks(name):
    torch.manual_seed(1)
    make, batch = GALLERY[name]
    model, x = make().double().train(), double(batch())
    largest, _ = equals_masks(model, x)
    assert largest < 1e-10
    # One graph per backend; masks do not count.
    assert (COUNTS.producers, COUNTS.consumers, COUNTS.unpacked) == FOUND[name]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.parametrize("name", sorted(BREAKS))
def test_no_graph_breaks_are_added(name):
    torch.manual_seed(1)
    make, batch = GALLERY[name]
    model, x = make().double().train(), double(batch())
    stock = copy.deepcopy(model)
    results(torch.compile(stock, backend="eager"), x, stock)
    breaks, compiles = sum(counters["graph_break"].values()), "unique_graphs" in counters["stats"]
    torch.compiler.reset()
    counters.clear()
    largest, _ = equals_masks(model, x, fullgraph=False)
    assert largest < 1e-10
    # Of two backends. A function that calls an LSTM is not captured.
    assert sum(counters["graph_break"].values()) <= 2 * breaks
    assert compiles or not COUNTS.graphs


class Tagger(nn.Module):
    """Dynamo does not capture the function that calls the LSTM, but captures that of the head."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.drop, self.b = nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4)

        def forward(self, x):
            return self.b(self.drop(torch.relu(self.a(x))))

    def __init__(self):
        super().__init__()
        self.embedding, self.drop, self.head = nn.Embedding(30, 12), nn.Dropout(0.5), self.Head()
        self.lstm, self.tags = nn.LSTM(12, 12, 2, dropout=0.5), nn.Sequential(nn.Linear(12, 8), nn.Dropout(0.5))

    def forward(self, words):
        hidden = self.drop(self.lstm(self.drop(self.embedding(words)))[0])
        return self.tags(hidden), self.head(hidden), self.head(hidden.detach().sin())


class InStatements(Tagger):
    """Dynamo captures the first statement, whose dropout only the LSTM reads; the LSTM is in a list."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.ModuleList([self.lstm])
        del self.lstm

    def forward(self, words):
        embedded = self.drop(self.embedding(words))
        return self.read(embedded)

    def read(self, embedded):
        embedded = embedded * 2.0
        hidden, _ = self.recurrent[0](embedded)
        hidden = self.drop(hidden)
        return self.tags(hidden), self.head(hidden), self.head(hidden.detach().sin())


@pytest.mark.parametrize("kind", [Tagger, InStatements])
def test_beside_an_lstm_layers_skip_as_in_eager_mode(kind):
    """Frames that run eagerly skip as in eager mode, with the same patterns; captured ones are rewritten."""
    found, tables = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = kind().double()
        report, _ = converted(model)
        f = torch.compile(model, backend=rewriting) if compiled else model
        for _ in range(3):
            resample(model)
            tags, *_ = f(torch.arange(35).remainder(30).view(7, 5))
            model.zero_grad()
            tags.square().sum().backward()
        found.append([tags, *(p.grad for p in model.parameters() if p.grad is not None)])
        tables.append([(row.name, row.producer, row.consumers, row.skipped) for row in report])
        restore(model)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) == 1 + 1 + 8 + 2
    assert tables[0] == tables[1]
    lstm = "lstm" if kind is Tagger else "recurrent.0"
    assert tables[0][0][2] == ("head.a", lstm, "tags.0")
    assert COUNTS.graphs > 0 and COUNTS.producers == COUNTS.consumers == COUNTS.graphs  # the head's


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "default"])
@pytest.mark.parametrize("name", ["mlp", "mlp sigmoid, batch of sequences", "transformer layers", "residual"])
def test_settings_equal_their_masks(name, setting):
    torch.manual_seed(1)
    make, batch = GALLERY[name]
    largest, _ = equals_masks(make().double().train(), double(batch()), steps=3, **SETTINGS[setting])
    assert largest < 1e-10
    assert COUNTS.consumers


def test_checkpointed_blocks_are_rewritten():
    """Activation checkpointing makes a subgraph."""
    torch.manual_seed(2)
    block = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 12), nn.Dropout(0.5))
    model = OneFunction(
        lambda m, x: m.c(checkpoint(m.block, x, use_reentrant=False)), block=block, c=nn.Linear(12, 4)
    )
    _, conversion = converted(model.double())
    x = torch.randn(6, 12, dtype=torch.float64)
    f, g = (torch.compile(model, backend=b, fullgraph=True) for b in (rewriting, masking))
    found = results(f, x, model)
    assert (COUNTS.producers, COUNTS.consumers) == (2, 1)
    conversion.resample(False)
    assert worst(found, results(g, x, model)) < 1e-12
    restore(model)


def test_one_graph_for_each_pair_over_200_steps():
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 4))
    report, conversion = converted(model)
    f, x = torch.compile(model, backend=rewriting, fullgraph=True), torch.randn(8, 12)
    pairs, outputs = set(), set()
    for _ in range(200):
        resample(model)
        pairs.add(conversion.book.pair(report.sites[0]))
        outputs.add(f(x).sum().item())
    assert 1 < len(pairs) <= 4
    assert counters["stats"]["unique_graphs"] == COUNTS.graphs == len(pairs)
    assert len(outputs) == 200  # a new pattern each
    assert not counters["graph_break"]
    restore(model)


def test_many_batch_sizes_need_two_graphs_for_each_pair():
    """One of the first size, and one of any size; a single row is special to Dynamo, hence its third."""
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 4)).double()
    report, conversion = converted(model)
    f, g = (torch.compile(model, backend=backend) for backend in (rewriting, masking))
    pairs = set()
    for step, rows in enumerate([12] * 60 + [7, 12, 5, 9, 1, 30] * 20):
        x = torch.randn(rows, 12, dtype=torch.float64)
        resample(model)
        pairs.add(conversion.book.pair(report.sites[0]))
        found = results(f, x, model)
        if step % 7 == 0:
            conversion.resample(False)
            assert worst(found, results(g, x, model)) < 1e-12
    assert len(pairs) == 4 and COUNTS.producers == COUNTS.consumers
    torch.compiler.reset()
    counters.clear()
    for rows in [12] * 60 + [7, 12, 5, 9, 30] * 20:
        resample(model)
        f(torch.randn(rows, 12, dtype=torch.float64))
    assert counters["stats"]["unique_graphs"] <= 2 * len(pairs)
    restore(model)


def test_evaluation_is_the_stock_models_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).eval()
    graphs = []

    def seen(gm, inputs):
        graphs.append([(n.op, str(n.target)) for n in gm.graph.nodes if n.op != "placeholder"])
        return gm.forward

    x = torch.randn(3, 12)
    expected = torch.compile(model, backend=seen)(x)
    torch.compiler.reset()
    converted(model)
    found = torch.compile(model, backend=seen)(x)
    restore(model)
    assert graphs[0] == graphs[1]
    assert torch.equal(expected, found)


def test_evaluation_of_an_lstm_is_captured_as_that_of_the_stock_model():
    torch.manual_seed(0)
    model, x = InStatements(), torch.arange(35).remainder(30).view(7, 5)
    graphs = []

    def seen(gm, inputs):
        graphs.append([(n.op, str(n.target)) for n in gm.graph.nodes if n.op != "placeholder"])
        return gm.forward

    f = torch.compile(model, backend=seen)
    expected = f(x), model.eval() and f(x)
    stock = graphs.copy()
    torch.compiler.reset()
    graphs.clear()
    converted(model.train())
    for _ in range(2):
        resample(model)
        torch.compile(model, backend=rewriting)(x)
    found = model.eval() and f(x)
    assert len(stock) == 2 * len(graphs) > 0 and graphs == stock[len(graphs) :]
    assert all(torch.equal(a, b) for a, b in zip(expected[1], found, strict=True))
    restore(model.train())
    graphs.clear()
    torch.compiler.reset()
    f(x)
    assert graphs == stock[: len(graphs)] and graphs
    assert sum("dropout" in target for graph in graphs for _, target in graph) == 3


def test_a_dropout_that_saves_too_little_is_native():
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    report, _ = converted(model, min_gain=None)
    resample(model)
    torch.manual_seed(4)
    found = torch.compile(model, backend=rewriting)(x := torch.randn(3, 12))
    assert (COUNTS.native, COUNTS.producers, COUNTS.consumers) == (1, 0, 0)
    assert "too few to gain" in str(report)
    restore(model)
    torch.manual_seed(4)
    x = torch.randn(3, 12)
    assert torch.equal(found, model(x))


def test_other_backends_mask_and_the_report_says_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).double()
    report, conversion = converted(model)
    x = torch.randn(6, 12, dtype=torch.float64)
    resample(model)
    found = results(torch.compile(model, backend="aot_eager"), x, model)
    assert "nothing: compiled by a backend that does not know it: masked" in str(report)
    conversion.resample(False)
    assert worst(found, results(torch.compile(model, backend=masking), x, model)) < 1e-12
    restore(model)


def test_the_report_names_layers_and_multiplies():
    model = OneFunction(lambda m, x: m.b(m.drop(F.relu(m.a(x)))), a=nn.Linear(12, 16), b=nn.Linear(16, 4))
    report, _ = converted(model)
    for _ in range(3):
        resample(model)
        torch.compile(model, backend=rewriting)(torch.randn(6, 12)).sum().backward()
    row = report["drop"]
    assert (row.producer, row.consumers) == ("a", ("b",))
    assert report.multiplies == 6 * (12 * 16 + 16 * 4)
    assert report.saved == pytest.approx(0.5)
    restore(model)


def _helper(x, training):
    return torch.dropout(x, 0.1, training)


class Functions(nn.Module):
    """Functional dropouts: in its own code, which the conversion inspects, and in a function that it calls."""

    def __init__(self):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x):
        x = F.dropout(self.drop(self.a(x)), 0.3, self.training)
        x = F.dropout(_helper(self.b(x), self.training), 0.2, training=False)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.0)


def test_functional_dropouts_of_the_graph_are_reported_once():
    model = nn.Sequential(Functions(), Functions())
    model[1].a = nn.Linear(4, 16)
    report, _ = converted(model)
    own = [row.name for row in report if row.site is None]
    assert len(own) == 2  # by the source: that of 0.3, and one whose rate is said to be 0.2 but is not training
    for _ in range(3):
        resample(model)
        torch.compile(model, backend=rewriting)(torch.randn(5, 12)).sum().backward()
    line = _helper.__code__.co_firstlineno + 1
    found = {row.name: row.rate for row in report if f"test_rewrite.py:{line}" in row.name}
    assert found == {f"{i} (test_rewrite.py:{line})": 0.1 for i in (0, 1)}
    assert sorted(row.rate or 0 for row in report) == [0, 0.1, 0.1, 0.3, 0.3, 0.5, 0.5]
    restore(model)


def test_attention_counts_as_in_eager_mode():
    """The attention of a stock encoder layer is a single node."""
    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.TransformerEncoderLayer(12, 2, 20, 0.5), nn.Linear(12, 4))
        model[0].self_attn.dropout = 0.0
        report, _ = converted(model)
        f = torch.compile(model, backend=rewriting) if compiled else model
        for _ in range(3):
            resample(model)
            f(torch.randn(5, 3, 12)).sum().backward()
        found.append(report.multiplies)
        restore(model)
    assert found[0] == found[1] == 15 * (4 * 12**2 + 2 * 5 * 12 + 2 * 12 * 20 + 12 * 4)


def test_multiplies_of_parts_compiled_separately_add_up():
    """Although the nodes of their graphs have the same names."""
    model = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 12)) for _ in range(2))
    report, _ = converted(model)
    parts = [torch.compile(part, backend=rewriting) for part in model]
    resample(model)
    parts[1](parts[0](torch.randn(6, 12))).sum().backward()
    assert report.multiplies == 2 * 6 * (12 * 16 + 16 * 12)
    restore(model)


def test_drawing_between_forward_and_backward_is_an_error():
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    converted(model)
    resample(model)
    y = torch.compile(model, backend=rewriting)(torch.randn(6, 12))
    resample(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    restore(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_compiles_as_the_stock_model(copied):
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    converted(model)
    resample(model)
    twin, x = copied(model), torch.randn(6, 12)
    torch.manual_seed(0)
    found = torch.compile(twin, backend=rewriting, fullgraph=True)(x)
    assert COUNTS.graphs == 0
    restore(model)
    torch.manual_seed(0)
    assert torch.equal(found, model(x))


def test_a_layer_that_outlives_its_model_is_stock_dropout():
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 4))
    converted(model)
    layers = list(model)
    del model
    gc.collect()
    torch.manual_seed(0)
    found = torch.compile(lambda x: layers[1](layers[0](x)), backend=rewriting)(x := torch.ones(6, 12))
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(F.linear(x, layers[0].weight, layers[0].bias), 0.5))
