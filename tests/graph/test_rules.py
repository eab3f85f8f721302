"""Each rule of the pass, on a model of a few lines: how much is rewritten, and that it equals masks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.compiled import OneFunction, converted, equals_masks, masking, results, rewriting, worst
from torch import nn
from torch._dynamo.utils import counters

from approxdrop_lightning import resample, restore
from approxdrop_lightning.graph.counts import COUNTS
from approxdrop_lightning.graph.nodes import is_linear
from approxdrop_lightning.graph.rewrite import rewrite

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def linear(n_in, n_out, **options):
    return nn.Linear(n_in, n_out, **options)


#: name -> (function, its layers, (layers before a dropout, layers after one, read whole beside))
RULES = {
    **{
        f"between: {name}": (
            lambda m, x, f=function: m.b(m.drop(f(m.a(x)))),
            {"a": linear(12, 16), "b": linear(16, 4)},
            (1, 1, 0),
        )
        for name, function in {
            "gelu, tanh": lambda h: F.gelu(h, approximate="tanh"),
            "leaky relu": lambda h: F.leaky_relu(h, 0.2),
            "silu": F.silu,
            "silu by hand": lambda h: h * torch.sigmoid(h),
            "arithmetic": lambda h: (2 * h + 1) / 3 - h.pow(2),
            "scalar first": lambda h: 1 - h,
            "method": lambda h: h.relu().mul(0.5),
            "in place": lambda h: F.relu(h, inplace=True),
            "operator in place": lambda h: torch.relu_(h),
            "cast": lambda h: h.float().double(),
            "clamp": lambda h: h.clamp(-1, 1),
            "view": lambda h: h.view(-1, 16).relu().reshape(5, 3, 16),
            "unsqueeze": lambda h: h.unsqueeze(0).relu().squeeze(0),
            "transpose": lambda h: h.transpose(0, 1).relu(),
            "permute, flatten, view": lambda h: h.permute(1, 0, 2).flatten(0, 1).sigmoid().view(1, 3, 5, 16),
            "views around transposes": lambda h: h.view(-1, 16).view(3, 5, 16).swapaxes(0, 1).tanh().movedim(1, 0),
        }.items()
    },
    **{
        f"after: {name}": (
            lambda m, x, f=function: m.b(f(m.drop(m.a(x)))),
            {"a": linear(12, 16), "b": linear(16, 4)},
            (1, consumers, unpacked),
        )
        for name, function, consumers, unpacked in (
            ("relu", F.relu, 1, 0),
            ("scale", lambda h: h * 0.5 / 3, 1, 0),
            ("view", lambda h: h.view(-1, 16), 1, 0),
            ("cast", lambda h: h.float().double(), 1, 0),
            ("all of it", lambda h: h[..., :16][:], 1, 0),
            ("a part of it", lambda h: F.pad(h[..., :15], (0, 1)), 0, 1),
            ("divided by zero", lambda h: torch.nan_to_num(h / 0.0), 0, 1),
            ("zero does not stay", torch.sigmoid, 0, 1),
            ("a sum", lambda h: h + 1, 0, 1),
            ("transposed", lambda h: h.transpose(0, 1), 1, 0),
            ("permuted and flattened", lambda h: h.view(5, 1, 3, 16).permute(2, 1, 0, -1).flatten(0, 2), 1, 0),
            ("units transposed", lambda h: h.transpose(1, 2).reshape(5, 3, 16), 0, 1),
            ("changed in place", lambda h: h.add_(1.0), 0, 1),
        )
    },
    "prelu of all": (
        lambda m, x: m.b(m.drop(F.prelu(m.a(x), m.slope))),
        {"a": linear(12, 16), "b": linear(16, 4), "slope": nn.Parameter(torch.tensor([0.2]))},
        (1, 1, 0),
    ),
    "prelu of units": (
        lambda m, x: m.b(m.drop(F.prelu(m.a(x.view(-1, 12)), m.slope))),
        {"a": linear(12, 16), "b": linear(16, 4), "slope": nn.Parameter(torch.rand(16))},
        (1, 1, 0),
    ),
    "a parameter for each unit": (
        lambda m, x: m.b(m.drop(m.a(x) * m.scale + m.shift)),
        {"a": linear(12, 16), "b": linear(16, 4), "scale": nn.Parameter(torch.rand(16)),
         "shift": nn.Parameter(torch.rand(1, 1, 16))},
        (1, 1, 0),
    ),
    "a value for each row": (
        lambda m, x: m.b(m.drop(m.a(x) * x[..., :1])),
        {"a": linear(12, 16), "b": linear(16, 4)},
        (1, 1, 0),
    ),
    "transposed beside others": (
        lambda m, x: m.b(
            m.drop((m.a(x).transpose(0, 1) * x.transpose(0, 1)[..., :1] + m.shift) * m.e(x.transpose(0, 1)))
        ),
        {"a": linear(12, 16), "b": linear(16, 4), "shift": nn.Parameter(torch.rand(16)), "e": linear(12, 16)},
        (2, 1, 0),
    ),
    "transposed between two dropouts": (
        lambda m, x: m.c(m.other(m.b(m.drop(m.a(x)).transpose(0, 1)))),
        {"a": linear(12, 16), "b": linear(16, 16), "c": linear(16, 4)},
        (2, 1, 1),  # one product cannot serve two orders of rows: the layer between them computes kept outputs
    ),
    "transposed, units in two chunks": (
        lambda m, x: m.b(m.drop(F.glu(m.a(x).transpose(0, 1)))),
        {"a": linear(12, 32), "b": linear(16, 4)},
        (1, 1, 0),
    ),
    "gated unit": (
        lambda m, x: m.b(m.drop(F.silu(m.gate(x)) * m.up(x))),
        {"gate": linear(12, 16), "up": linear(12, 16), "b": linear(16, 4)},
        (2, 1, 0),
    ),
    "glu": (lambda m, x: m.b(m.drop(F.glu(m.a(x)))), {"a": linear(12, 32), "b": linear(16, 4)}, (1, 1, 0)),
    "chunk": (
        lambda m, x: (lambda g, u: m.b(m.drop(F.silu(g) * u)))(*m.a(x).chunk(2, -1)),
        {"a": linear(12, 32, bias=False), "b": linear(16, 4)},
        (1, 1, 0),
    ),
    "split": (
        lambda m, x: (lambda g, u: m.b(m.drop(torch.tanh(g) * u)))(*torch.relu(m.a(x)).split(16, dim=-1)),
        {"a": linear(12, 32), "b": linear(16, 4)},
        (1, 1, 0),
    ),
    "one gate is read elsewhere": (
        lambda m, x: (lambda g, u: m.b(m.drop(g * u)) + u[..., :4])(*m.a(x).chunk(2, -1)),
        {"a": linear(12, 32), "b": linear(16, 4)},
        (0, 1, 0),
    ),
    "residual before": (
        lambda m, x: m.b(m.drop(m.a(x) + x)),
        {"a": linear(12, 12), "b": linear(12, 4)},
        (1, 1, 0),
    ),
    "residual after": (
        lambda m, x: m.b(m.drop(m.a(x)) + x),
        {"a": linear(12, 12), "b": linear(12, 4)},
        (1, 0, 1),
    ),
    "layer norm before": (
        lambda m, x: m.b(m.drop(m.norm(m.a(x)))),
        {"a": linear(12, 16), "norm": nn.LayerNorm(16), "b": linear(16, 4)},
        (0, 1, 0),
    ),
    "batch norm before": (
        lambda m, x: m.b(m.drop(m.norm(m.a(x.view(-1, 12))))),
        {"a": linear(12, 16), "norm": nn.BatchNorm1d(16), "b": linear(16, 4)},
        (0, 1, 0),
    ),
    "read elsewhere": (
        lambda m, x: (lambda h: m.b(m.drop(h)) + h[..., :4])(m.a(x)),
        {"a": linear(12, 16), "b": linear(16, 4)},
        (0, 1, 0),
    ),
    "several consumers and a whole reader": (
        lambda m, x: (lambda h: m.b(h) * m.c(h) + h.sum(-1, keepdim=True))(m.drop(m.a(x))),
        {"a": linear(12, 16), "b": linear(16, 4), "c": linear(16, 4)},
        (1, 2, 1),
    ),
    "tied weights": (
        lambda m, x: F.linear(m.other(torch.tanh(F.linear(m.drop(m.a(x)), m.a.weight.t()))), m.a.weight),
        {"a": linear(12, 16)},
        (2, 2, 0),
    ),
    "concatenation before": (
        lambda m, x: m.b(m.drop(F.prelu(torch.cat([m.a(x), torch.tanh(m.c(x)), x], -1), m.slope) * 2)),
        {"a": linear(12, 16), "c": linear(12, 8), "b": linear(36, 4), "slope": nn.Parameter(torch.tensor([0.2]))},
        (2, 3, 0),
    ),
    "concatenation after": (
        lambda m, x: m.b(torch.relu(torch.cat((m.drop(m.a(x)), x, m.other(x)), dim=2))),
        {"a": linear(12, 16), "b": linear(40, 4, bias=False)},
        (1, 2, 0),
    ),
    "concatenation that is read elsewhere": (
        lambda m, x: (lambda h: m.b(m.drop(h)) + h[..., :4])(torch.cat([m.a(x), m.c(x)], -1)),
        {"a": linear(12, 16), "c": linear(12, 8), "b": linear(24, 4)},
        (0, 1, 0),
    ),
    "concatenation of rows": (
        lambda m, x: m.b(m.drop(torch.cat([m.a(x), m.c(x)], 1))),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4)},
        (0, 1, 0),
    ),
    "concatenation with a parameter for each unit": (
        lambda m, x: m.b(m.drop(torch.cat([m.a(x), m.c(x)], -1) * m.scale)),
        {"a": linear(12, 16), "c": linear(12, 8), "b": linear(24, 4), "scale": nn.Parameter(torch.rand(24))},
        (0, 1, 0),
    ),
    "concatenation whose zeros do not stay": (
        lambda m, x: m.b(torch.cat((m.drop(m.a(x)), x), -1).cos()),
        {"a": linear(12, 16), "b": linear(28, 4)},
        (1, 0, 1),
    ),
    "stack after": (
        lambda m, x: m.b(torch.relu(torch.stack((m.drop(m.a(x)), m.other(m.c(x))), 1))),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4, bias=False)},
        (2, 2, 0),
    ),
    "stack with several readers": (
        lambda m, x: (lambda h: m.b(h) * m.e(F.silu(h) / 2) + m.f(h.flatten(2)).unsqueeze(-2) + h.sum())(
            torch.stack([m.drop(m.a(x)), m.other(m.c(x))], dim=-2)
        ),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4), "e": linear(16, 4), "f": linear(32, 4)},
        (2, 6, 2),
    ),
    "stack of stacks": (
        lambda m, x: m.b(torch.stack([torch.stack([m.drop(m.a(x)), m.other(m.a(x))]), m.c(x).expand(2, 5, 3, 16)])),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4)},
        (2, 0, 2),
    ),
    "layers of a stack": (
        lambda m, x: m.c(F.gelu(m.b(torch.stack([m.drop(m.a(x)), m.other(m.a(x))], 0))).flatten(0, 1)),
        {"a": linear(12, 16), "b": linear(16, 16), "c": linear(16, 4)},
        (2, 2, 0),
    ),
    "stack that is flattened": (
        lambda m, x: m.b(torch.stack([m.drop(m.a(x)), m.other(m.c(x))], 2).relu().view(5, 3, 32)),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(32, 4)},
        (2, 2, 0),
    ),
    "stack that is flattened before": (
        lambda m, x: m.b(m.drop(F.prelu(torch.stack([m.a(x), torch.tanh(m.c(x))], -2).flatten(-2), m.slope))),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(32, 4), "slope": nn.Parameter(torch.tensor([0.2]))},
        (2, 2, 0),
    ),
    "stack that is flattened otherwise": (
        lambda m, x: m.b(torch.stack([m.drop(m.a(x)), m.other(m.c(x))], 1).flatten(2)),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(48, 4)},
        (2, 0, 2),
    ),
    "dropout of a stack": (
        lambda m, x: m.b(m.drop(torch.stack([m.a(x), torch.tanh(m.c(x))], 1).relu())),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4)},
        (2, 2, 0),
    ),
    "dropout of a stack that is flattened": (
        lambda m, x: m.b(m.drop(torch.stack([m.a(x), m.c(x)], dim=-2)).flatten(-2).relu()),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(32, 4)},
        (2, 2, 0),
    ),
    "dropout of a stack of layers of stacks": (
        lambda m, x: m.b(m.other(F.gelu(m.e(m.drop(torch.stack([m.a(x), m.c(x)]))))).sum(0)),
        {"a": linear(12, 16), "c": linear(12, 16), "e": linear(16, 16), "b": linear(16, 4)},
        (4, 2, 2),
    ),
    "dropout of a stack that something else reads": (
        lambda m, x: (lambda h: m.b(m.drop(h)) + h[..., :4])(torch.stack([m.a(x), m.c(x)], 1)),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4)},
        (0, 1, 0),
    ),
    "sum of a stack": (
        lambda m, x: m.b(m.drop(torch.stack([m.a(x), m.c(x), x.relu()], dim=1).relu().sum(dim=1) + 1)),
        {"a": linear(12, 12), "c": linear(12, 12), "b": linear(12, 4)},
        (2, 1, 0),
    ),
    "mean of a stack of layers of a stack": (
        lambda m, x: m.c(
            m.drop(torch.tanh(torch.mean(m.b(torch.stack([m.other(m.a(x)), m.other(m.e(x))], -2)), (-2,))))
        ),
        {"a": linear(12, 16), "e": linear(12, 16), "b": linear(16, 16), "c": linear(16, 4)},
        (4, 3, 0),
    ),
    "sum over another dimension": (
        lambda m, x: m.b(m.drop(torch.stack([m.a(x), m.c(x)], 1).sum(2))),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4)},
        (0, 1, 0),
    ),
    "sum that keeps the dimension": (
        lambda m, x: m.b(m.drop(torch.stack([m.a(x), m.c(x)], 1).sum(1, keepdim=True))),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4)},
        (0, 1, 0),
    ),
    "stack in the dimension of the units": (
        lambda m, x: m.b(torch.stack([m.drop(m.a(x)), m.other(m.c(x))], -1)),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(2, 4)},
        (2, 0, 2),
    ),
    "stack with what was not dropped": (
        lambda m, x: m.b(torch.stack([m.drop(m.a(x)), m.c(x)], 1)),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4)},
        (1, 0, 1),
    ),
    "stack whose zeros do not stay": (
        lambda m, x: m.b(torch.stack([m.drop(m.a(x)), m.other(m.c(x))], 1).cos()),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4)},
        (2, 0, 2),
    ),
    "stack that is changed in place": (
        lambda m, x: (lambda h: (lambda changed: m.b(h) + changed[..., :4])(h.add_(1.0)))(
            torch.stack([m.drop(m.a(x)), m.other(m.c(x))], 1)
        ),
        {"a": linear(12, 16), "c": linear(12, 16), "b": linear(16, 4)},
        (2, 0, 2),
    ),
    "layer of a stack that is changed in place": (
        lambda m, x: (lambda h: (lambda changed: m.c(h.flatten(2)) + changed[:, :, 0, :4])(h.add_(1.0)))(
            m.b(torch.stack([m.drop(m.a(x)), m.other(m.a(x))], 2))
        ),
        {"a": linear(12, 16), "b": linear(16, 16), "c": linear(32, 4)},
        (2, 0, 2),
    ),
    "keywords": (
        lambda m, x: F.linear(m.drop(m.a(x)), weight=m.b.weight, bias=m.b.bias),
        {"a": linear(12, 16), "b": linear(16, 4)},
        (1, 1, 0),
    ),
    "changed after it was dropped from": (
        lambda m, x: (lambda h, d: m.b(d) + h.mul_(2.0)[..., :4])(*(lambda h: (h, m.drop(h)))(m.a(x) * 1.0)),
        {"a": linear(12, 16), "b": linear(16, 4)},
        (0, 1, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    torch.manual_seed(2)
    function, layers, found = RULES[name]
    model = OneFunction(function, **copy.deepcopy(layers)).double().train()
    largest, _ = equals_masks(model, torch.randn(5, 3, 12, dtype=torch.float64), steps=2)
    assert largest < (1e-6 if "cast" in name else 1e-10)
    graphs = COUNTS.graphs - counters["stats"]["unique_graphs"] // 2  # masks count their graphs too
    assert (COUNTS.producers / graphs, COUNTS.consumers / graphs, COUNTS.unpacked / graphs) == found


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_transposes_of_padded_and_of_symbolic_rows(rate):
    """In a batch ``[T, 4, n]`` rows are padded, so that groups depend on its shape; ``T`` varies."""
    torch.manual_seed(2)
    model = OneFunction(
        lambda m, x: m.b(m.drop(torch.relu(m.a(x)).transpose(0, 1)).transpose(1, 0).flatten(0, 1)),
        a=nn.Linear(12, 64), b=nn.Linear(64, 4),
    ).double()  # fmt: skip
    report, conversion = converted(model, rate=rate, concentration=float("inf"))
    f, g = (torch.compile(model, backend=backend, fullgraph=True) for backend in (rewriting, masking))
    for steps in (6, 6, 8, 10):
        resample(model)
        x = torch.randn(steps, 4, 12, dtype=torch.float64)
        found = results(f, x, model)
        conversion.resample(False)
        assert worst(found, results(g, x, model)) < 1e-12
    assert report["drop"].skipped == "producer's rows and consumers' columns"
    restore(model)


def test_parts_of_a_concatenation_have_patterns_of_their_own():
    """Against the model's own formula with the masks of the parts side by side."""
    torch.manual_seed(0)
    model = OneFunction(RULES["concatenation before"][0], **copy.deepcopy(RULES["concatenation before"][1])).double()
    report, _ = converted(model, rate=0.7)
    x = torch.randn(5, 3, 12, dtype=torch.float64)
    resample(model)
    found = results(torch.compile(model, backend=rewriting), x, model)
    assert (COUNTS.producers, COUNTS.consumers) == (2, 3)
    patterns = report["drop"].site.last_patterns
    assert [pattern.n for pattern in patterns] == [16, 8, 12]
    mask = torch.cat([pattern.mask(5, 3, dtype=torch.float64, value=1 / 0.3) for pattern in patterns], -1)
    restore(model)
    model.drop.forward = lambda x: x * mask
    assert worst(found, results(model, x, model)) < 1e-12


@pytest.mark.parametrize(
    ("name", "found"),
    [("stack after", (2, 2)), ("stack that is flattened", (2, 2)), ("stack with several readers", (2, 6))],
)
def test_stacked_dropouts_are_those_of_the_model(name, found):
    """The masks that the other tests compare with are put into the graph of the pass: here, into the model itself."""
    torch.manual_seed(0)
    function, layers, _ = RULES[name]
    model = OneFunction(function, **copy.deepcopy(layers)).double()
    report, _ = converted(model)
    x = torch.randn(5, 3, 12, dtype=torch.float64)
    resample(model)
    result = results(torch.compile(model, backend=rewriting), x, model)
    assert (COUNTS.producers, COUNTS.consumers) == found
    masks = {name: report[name].site.last_patterns for name in ("drop", "other")}
    restore(model)
    for name, (pattern,) in masks.items():
        mask = pattern.mask(5, 3, dtype=torch.float64, value=2)
        getattr(model, name).forward = lambda x, mask=mask: x * mask
    assert worst(result, results(model, x, model)) < 1e-12


def test_stacked_outputs_of_layers_are_dropped_by_patterns_of_their_own():
    """Against the model's own formula with the masks of the parts stacked."""
    torch.manual_seed(0)
    function, layers, _ = RULES["dropout of a stack"]
    model = OneFunction(function, **copy.deepcopy(layers)).double()
    report, _ = converted(model)
    x = torch.randn(5, 3, 12, dtype=torch.float64)
    resample(model)
    found = results(torch.compile(model, backend=rewriting), x, model)
    assert (COUNTS.producers, COUNTS.consumers) == (2, 2) and (report["drop"].producer, report["drop"].consumers) == (
        "a, c",
        ("b",),
    )
    patterns = report["drop"].site.last_patterns
    assert len(patterns) == 2
    mask = torch.stack([pattern.mask(5, 3, dtype=torch.float64, value=2) for pattern in patterns], 1)
    restore(model)
    model.drop.forward = lambda x: x * mask
    assert worst(found, results(model, x, model)) < 1e-12


def test_stacks_of_many_batch_sizes():
    torch.manual_seed(2)
    model = OneFunction(
        lambda m, x: (lambda h: m.c(m.b(h).flatten(1)) + m.c(h.flatten(1)))(
            torch.stack([m.drop(m.a(x)), m.other(m.a(x))], 1)
        ),
        a=nn.Linear(12, 16), b=nn.Linear(16, 16), c=nn.Linear(32, 4),
    ).double()  # fmt: skip
    report, conversion = converted(model, concentration=float("inf"))
    f, g = (torch.compile(model, backend=backend, fullgraph=True) for backend in (rewriting, masking))
    for rows in (6, 8, 11):
        resample(model)
        x = torch.randn(rows, 12, dtype=torch.float64)
        found = results(f, x, model)
        conversion.resample(False)
        assert worst(found, results(g, x, model)) < 1e-12
    assert counters["stats"]["unique_graphs"] == 4  # of either backend one for the first size, and one for all others
    assert report["drop"].consumers == ("b", "c")
    restore(model)


@pytest.mark.parametrize(("saved", "consumers"), [(5 * 3 * 16 * 4 // 2, 2), (5 * 3 * 16 * 4 // 2 + 1, 0)])
def test_a_layer_of_a_stack_stays_one_product_if_each_part_would_save_too_little(saved, consumers):
    torch.manual_seed(0)
    model = OneFunction(RULES["stack after"][0], **copy.deepcopy(RULES["stack after"][1])).double()
    converted(model, min_gain=saved)
    resample(model)
    graphs = []

    def backend(gm, inputs):
        rewrite(gm)
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(5, 3, 12, dtype=torch.float64)).sum().backward()
    restore(model)
    assert (COUNTS.producers, COUNTS.consumers) == (2, consumers)
    assert sum(map(is_linear, graphs[0].graph.nodes)) == (0 if consumers else 1)
