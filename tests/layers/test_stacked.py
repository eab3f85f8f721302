"""Stacked tensors stay lazy: what is skipped of them, and where they give way.

That values and gradients are those of the masked model, also of gradients that somebody asks for later and of second
derivatives, is shown with the gallery's models, in test_gallery.py, test_late_readers.py and test_derivatives.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.flops import executed_share
from support.skipping import set_thresholds
from support.twin import twin
from torch import nn
from torch.utils.checkpoint import checkpoint

from approxdrop_lightning import approximate, resample
from approxdrop_lightning.layers.combined import PendingCombination
from approxdrop_lightning.layers.compact_tensor import CompactTensor
from approxdrop_lightning.layers.stacked import StackedTensor
from approxdrop_lightning.patterns.joined import JoinedPattern

ALL = {"min_gain": 0, "pattern_everywhere": True}
BOTH = "producer's rows and consumers' columns"


class Net(nn.Module):
    """Layers ``a`` and ``b`` with dropouts of their own, a third dropout, ``out``, and a function of these."""

    def __init__(self, function, n=32, n_in=32):
        super().__init__()
        self.a, self.b = nn.Linear(16, n), nn.Linear(16, n)
        self.first, self.second, self.third = (nn.Dropout(0.5) for _ in range(3))
        self.out, self.function = nn.Linear(n_in, 8), function

    def parts(self, x):
        return [self.first(self.a(x).relu()), self.second(self.b(x).relu())]

    def forward(self, x):
        return self.function(self, x)


def converted(function, n_in=32, **options):
    torch.manual_seed(0)
    model = Net(function, n_in=n_in).double()
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0, **ALL | options)
    resample(model)
    return model, stock, report


def step(model, *rows):
    x = torch.randn(*rows, 16, dtype=torch.float64, requires_grad=True)
    y = model(x) * 1.0
    y.square().sum().backward()
    return x, y


def assert_equals_masked(model, stock, report, x, y):
    masked, gradient = twin(stock, report), x.grad
    x.grad = None
    expected = masked(x) * 1.0
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, x.grad, rtol=0, atol=1e-10)
    for mine, theirs in zip(model.parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"interleave": False}, {"rate": 0.7}])
@pytest.mark.parametrize(
    ("function", "rows"),
    [
        (lambda m, x: m.out(torch.stack(m.parts(x))), (12,)),
        (lambda m, x: m.out(torch.stack(m.parts(x), dim=1)), (12,)),
        (lambda m, x: m.out(torch.stack(m.parts(x), -2)), (5, 4)),
        (lambda m, x: m.out(torch.stack(tuple(m.parts(x)), 1).tanh() * 0.5), (5, 4)),
        (lambda m, x: F.linear(torch.stack(m.parts(x)), m.out.weight, bias=m.out.bias), (12,)),
        (lambda m, x: m.out(torch.stack([torch.stack(m.parts(x)).unbind(0)[0], m.parts(x)[1]])), (12,)),
        (lambda m, x: m.out(torch.stack(m.parts(x)[:1] * 2)), (12,)),
    ],
    ids=["first", "second", "before the units", "elementwise", "F.linear", "taken apart", "one twice"],
)
def test_a_layer_of_dropped_out_tensors_reads_kept_columns(function, rows, options, request):
    model, stock, report = converted(function, **options)
    x, y = step(model, *rows)
    name = request.node.callspec.id
    for key in ("first",) if "taken" in name or "twice" in name else ("first", "second"):
        assert report[key].producer == {"first": "a", "second": "b"}[key]
    if "taken" not in name:  # which reads the stack whole
        reader = "F.linear" if "F.linear" in name else "out"
        assert report["first"].consumers == (reader,) and not report["first"].site.dense_readers
    assert_equals_masked(model, stock, report, x, y)


def test_the_layer_multiplies_kept_columns_only(monkeypatch):
    model = Net(lambda m, x: m.out(torch.stack(m.parts(x), 1)), n=256, n_in=256)
    assert executed_share(model, torch.randn(64, 16), monkeypatch, interleave=False, **ALL) == 1 / 2


@pytest.mark.parametrize("shape", [lambda h: h.flatten(-2), lambda h: h.reshape(12, -1), lambda h: h.view(3, 4, 64)])
def test_dropped_out_tensors_that_get_side_by_side_are_a_concatenation(shape):
    found = []

    def function(m, x):
        found.append(shape(torch.stack(m.parts(x), dim=1)))
        return m.out(found[-1])

    model, stock, report = converted(function, n_in=64)
    x, y = step(model, 12)
    assert isinstance(found[0], CompactTensor) and isinstance(found[0].held.pattern, JoinedPattern)
    assert report["first"].consumers == report["second"].consumers == ("out",)
    assert_equals_masked(model, stock, report, x, y)


@pytest.mark.parametrize(
    ("function", "n_in"),
    [
        (lambda m, x: torch.stack([m.a(x), m.b(x)], 1).flatten(1), 64),
        (lambda m, x: torch.stack([m.a(x), m.b(x).tanh()], 1).relu().reshape(12, 64), 64),
        (lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(0), 32),
        (lambda m, x: torch.sum(torch.stack([m.a(x), m.b(x)], 1).sigmoid(), dim=[1]), 32),
        (lambda m, x: torch.stack([m.a(x), m.b(x)], 1).mean(dim=-2) + 1, 32),
    ],
    ids=["flatten", "elementwise, reshape", "sum", "elementwise, torch.sum", "mean"],
)
def test_waiting_layers_compute_kept_units_only(function, n_in):
    found = []

    def whole(m, x):
        found.append(function(m, x))
        return m.out(m.third(found[-1]))

    model, stock, report = converted(whole, n_in)
    x, y = step(model, 12)
    row = report["third"]
    assert isinstance(found[0], PendingCombination)
    assert (row.producer, row.consumers, row.skipped) == ("a, b", ("out",), BOTH)
    assert_equals_masked(model, stock, report, x, y)


def test_waiting_outputs_of_a_layer_of_a_stack_are_added_up():
    """As of towers that end in one layer, whose mean is dropped: everything is skipped on both sides."""
    torch.manual_seed(0)
    model = Net(lambda m, x: m.tail(m.third(m.out(torch.stack(m.parts(x), 1)).mean(1).relu())))
    model.tail = nn.Linear(8, 4)
    stock = copy.deepcopy(model.double())
    report = approximate(model, seed=0, **ALL)
    for _ in range(3):
        resample(model)
        model.zero_grad()
        x, y = step(model, 12)
    assert report["third"].producer == "out" and report["first"].consumers == ("out",)
    assert [row.skipped for row in report] == [BOTH] * 3
    assert_equals_masked(model, stock, report, x, y)


@pytest.mark.parametrize(
    ("function", "reader"),
    [
        (lambda m, x: torch.stack(m.parts(x), -1).sum(-1), "stack"),
        (lambda m, x: torch.stack([*m.parts(x), x @ x.new_ones(16, 32)]), "stack"),
        (lambda m, x: torch.stack([m.parts(x)[0], m.parts(x)[1]], 1).cos(), "cos"),
        (lambda m, x: torch.stack(m.parts(x), 1).sum(1), "sum"),
        (lambda m, x: torch.stack(m.parts(x), 1).flatten(0, 1), "flatten"),
        (lambda m, x: torch.stack(m.parts(x)).add_(1.0), "add_"),
        (lambda m, x: F.relu(torch.stack(m.parts(x)) * 2, inplace=True), "relu"),
        (lambda m, x: torch.stack(m.parts(x)).view(torch.int64).view(torch.float64), "view"),
    ],
    ids=["units", "an ordinary one", "cos", "sum", "rows", "in place", "inplace", "type"],
)
def test_what_others_make_of_a_stack_is_dense_and_right(function, reader):
    def whole(m, x):
        return m.out(torch.nan_to_num(function(m, x), 1.0, 2.0, 3.0))

    model, stock, report = converted(whole)
    x, y = step(model, 12)
    assert report["first"].producer == "a"
    assert any(reader in name for name in report["first"].site.dense_readers)
    assert_equals_masked(model, stock, report, x, y)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.stack([m.a(x), m.b(x)], -1).flatten(-2),
        lambda m, x: torch.stack([m.a(x), m.b(x)], 1).flatten(0, 1),
        lambda m, x: torch.stack([m.a(x), m.b(x)], 1).sum(1, keepdim=True),
        lambda m, x: torch.stack([m.a(x), m.b(x)], 1).sum((0, 1)),
        lambda m, x: torch.stack([m.a(x), m.b(x)], 1).sum(1, dtype=torch.float32).double(),
        lambda m, x: torch.stack([m.a(x), m.b(x).float()], 1).mean(1).double(),
        lambda m, x: F.layer_norm(torch.stack([m.a(x), m.b(x)], 1), (32,)).sum(1),
    ],
)
def test_what_others_make_of_stacked_layers_is_dense_and_right(function):
    x = torch.randn(12, 16, dtype=torch.float64)
    model, stock, report = converted(lambda m, x: m.third(function(m, x)))
    torch.testing.assert_close(function(model, x) * 1.0, function(stock, x))
    (model(x) * 1.0).sum().backward()
    assert report["third"].producer is None


@pytest.mark.parametrize("rows", [(12,), (5, 4)])
@pytest.mark.parametrize(
    ("function", "n_in", "dim"),
    [
        (lambda m, x: m.out(m.third(torch.stack([m.a(x), m.b(x)], 1).relu())), 32, 1),
        (lambda m, x: m.out(m.third(torch.stack([m.a(x), m.b(x).tanh()]) / 2) * 2), 32, 0),
        (lambda m, x: m.out(m.third(torch.stack([m.a(x), m.b(x)], -2)).flatten(-2)), 64, -2),
    ],
    ids=["a layer of the stack", "elementwise", "side by side"],
)
def test_a_dropout_of_stacked_layers_drops_from_each_by_a_pattern_of_its_own(function, n_in, dim, rows):
    model, stock, report = converted(function, n_in)
    for _ in range(3):
        resample(model)
        model.zero_grad()
        x, y = step(model, *rows)
    row = report["third"]
    assert (row.skipped, set(row.producer.split(", ")), row.consumers) == (BOTH, {"a", "b"}, ("out",))
    masks = [pattern.mask(*rows, dtype=torch.float64, value=2) for pattern in row.site.last_patterns]
    stock.third.forward = lambda x: x * torch.stack(masks, dim)
    gradient, x.grad = x.grad, None
    expected = stock(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, x.grad, rtol=0, atol=1e-10)
    for mine, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)


def test_a_dropout_of_stacked_layers_that_is_stock_is_one_dropout(monkeypatch):
    set_thresholds(monkeypatch, saved=1_000_000)
    model = Net(lambda m, x: m.out(m.third(torch.stack([m.a(x), m.b(x)], 1).relu())))
    report = approximate(model, seed=0)
    shapes = []
    model.third.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    for _ in range(3):
        resample(model)
        model(torch.randn(12, 16)).sum().backward()
    assert shapes == [(12, 2, 32)] * 3 and not report["third"].site.draws.uses
    assert "fewer than 1,000,000" in report["third"].skipped


def test_the_report_names_the_stack_before_a_dropout():
    function = lambda m, x: m.out(m.third(torch.stack([m.a(x), m.b(x), x.new_ones(12, 32)], 1).relu()))  # noqa: E731
    model, _, report = converted(function)
    step(model, 12)
    assert "a is read whole by stack; b is read whole by stack" in report["third"].skipped


def test_parts_that_would_save_too_little_are_one_product(monkeypatch):
    """The threshold holds for the product of each part."""
    n_saved = 12 * 32 * 8 // 2
    for least, consumers in ((n_saved, ("out",)), (n_saved + 1, ())):
        set_thresholds(monkeypatch, saved=least)
        torch.manual_seed(0)
        model = Net(lambda m, x: m.out(torch.stack([m.first(x), m.second(x)], 1)), n_in=32)
        report = approximate(model, seed=0)
        resample(model)
        model(torch.randn(12, 32)).sum().backward()
        resample(model)
        assert report["first"].consumers == report["second"].consumers == consumers
        if not consumers:
            assert f"fewer than {least:,}" in report["second"].skipped


def test_what_stands_beside_a_stock_dropout_is_decided_again(monkeypatch):
    """Since it is stacked with an ordinary tensor from then on, which ends the skipping of both."""
    set_thresholds(monkeypatch, whole=1_000_000)
    torch.manual_seed(0)

    def function(m, x):
        parts = [m.first(x), m.second(x)]
        return m.out(torch.stack(parts, 1)) + parts[1].sum()

    model = Net(function, n_in=32)
    report = approximate(model, seed=0)
    consumers = []
    for _ in range(3):
        resample(model)
        model(torch.randn(12, 32)).sum().backward()
        consumers.append(report["first"].consumers)
    resample(model)
    assert consumers[0] == ("out",) and report["first"].consumers == () == report["second"].consumers


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("segment", ["all", "parts", "reader"])
def test_activation_checkpointing(use_reentrant, segment):
    def again(function, x):
        return checkpoint(function, x, use_reentrant=use_reentrant) if checkpoints else function(x)

    ways = {
        "all": lambda m, x: m.out(torch.stack(m.parts(x), 1).relu()),
        "parts": lambda m, x: m.out(again(lambda x: torch.stack(m.parts(x), 1), x).relu()),
        "reader": lambda m, x: again(lambda h: m.out(h.relu()), torch.stack(m.parts(x), 1)),
    }
    checkpoints = True
    model, stock, report = converted(ways[segment])
    x = torch.randn(12, 16, dtype=torch.float64, requires_grad=True)
    y = (again(model, x) if segment == "all" else model(x)) * 1.0
    y.square().sum().backward()
    assert report["first"].producer == "a"
    checkpoints = False  # of the twin, whose masks are there once
    assert_equals_masked(model, stock, report, x, y)


def test_autocast():
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.out(torch.stack(m.parts(x), 1)).sum(1) + m.out(m.third(torch.stack([m.a(x), m.b(x)]).mean(0)))
    )
    stock = copy.deepcopy(model)
    report = approximate(model, seed=0, **ALL)
    resample(model)
    x = torch.randn(12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x) * 1.0
        expected = twin(stock, report)(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    assert report["first"].consumers == ("out",) and report["third"].producer == "a, b"


@pytest.mark.parametrize("kind", ["dropped out", "waiting"])
def test_changes_in_place_are_seen_by_those_who_read_what_is_changed(kind):
    """The stack is a copy of its parts: neither sees a change of the other."""
    x = torch.randn(12, 16, dtype=torch.float64)

    def run(m, parts):
        a, b = parts
        stacked = torch.stack([a, b], 1)
        lazy = isinstance(stacked, StackedTensor)
        first = m.out(torch.stack([a, b], 1)) * 1.0
        before = torch.stack([a, b], 1)
        a.add_(1.0)
        stacked.mul_(2.0)
        return lazy, [first, m.out(before) * 1.0, m.out(stacked) * 1.0, a * 1.0, b * 1.0, m.out(torch.stack([a, b]))]

    model, stock, report = converted(None)
    lazy, found = run(model, model.parts(x) if kind == "dropped out" else [model.a(x), model.b(x)])
    assert lazy
    masked = twin(stock, report)
    _, expected = run(masked, masked.parts(x) if kind == "dropped out" else [masked.a(x), masked.b(x)])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine * 1.0, theirs)


def test_without_gradients_it_is_dense():
    model, _, _ = converted(None)
    parts = model.parts(torch.randn(12, 16, dtype=torch.float64))
    stacked = torch.stack(parts, 1)
    assert isinstance(stacked, StackedTensor)
    with torch.no_grad():
        dense, found = torch.stack(parts, 1), stacked.relu()
    assert type(dense) is type(found) is torch.Tensor and not found.requires_grad
    torch.testing.assert_close(found, dense.relu())
    assert (stacked * 1).requires_grad


@pytest.mark.parametrize("dim", [3, -4, "1"])
def test_errors_are_those_of_pytorch(dim):
    model, _, _ = converted(None)
    parts = model.parts(torch.randn(12, 16, dtype=torch.float64))
    with pytest.raises((IndexError, TypeError), match="range|int"):
        torch.stack(parts, dim)
    with pytest.raises(RuntimeError, match="equal size"):
        torch.stack([parts[0], model.first(model.a(torch.randn(3, 16, dtype=torch.float64)))])


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


@pytest.mark.parametrize("kind", ["dropped out", "waiting"])
def test_functions_past_overrides_leave_the_parts_their_history(kind):
    def function(m, x):
        parts = m.parts(x) if kind == "dropped out" else [m.a(x), m.b(x)]
        y = _Twice.apply(torch.stack(parts, 1))
        return m.out(y.sum(1)) + m.out(parts[0]) + m.out(m.third(parts[1]))

    model, stock, report = converted(function)
    x, y = step(model, 12)
    assert report["first"].consumers == ("out",) if kind == "dropped out" else report["third"].producer == "b"
    assert_equals_masked(model, stock, report, x, y)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["read by a layer", "side by side", "added up"])
def test_hooks_on_the_stack_and_on_a_part_see_the_gradient_and_may_change_it(kind, late):
    def run(m, x):
        parts = [m.a(x), m.b(x)] if kind == "added up" else m.parts(x)
        stacked = torch.stack(parts, 1)
        seen = []

        def watch():
            stacked.register_hook(lambda g: (seen.append(g.clone()), g * 2)[1])
            parts[1].register_hook(lambda g: (seen.append(g.clone()), g + 1)[1])
            stacked.retain_grad()

        if not late:
            watch()
        if kind == "read by a layer":
            y = m.out(stacked)
        elif kind == "side by side":
            y = stacked.flatten(1)
        else:
            y = m.out(m.third(stacked.sum(1)))
        if late:
            watch()
        (y * 1.0).square().sum().backward()
        return [*seen, stacked.grad, *(p.grad for p in m.parameters() if p.grad is not None)]

    x = torch.randn(12, 16, dtype=torch.float64)
    model, stock, report = converted(None)
    found = run(model, x)
    assert late is False or report["third" if kind == "added up" else "first"].producer
    for mine, theirs in zip(found, run(twin(stock, report), x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_many_stacks_of_stacks_are_walked_once():
    """Each one is made of all parts of the one above: walking every way up would take 4 ** 20 steps."""
    model, _, _ = converted(None)
    x = torch.randn(3, 16, dtype=torch.float64)
    stacked = torch.stack([*model.parts(x), *model.parts(x)], 1)
    for _ in range(20):
        stacked = stacked.relu()
    assert isinstance(stacked, StackedTensor)
    model.out(stacked).sum().backward()
    assert model.a.weight.grad is not None
