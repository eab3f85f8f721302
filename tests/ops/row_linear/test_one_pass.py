"""One pass over the weight for all groups equals masked dense products, for any groups and panels."""

import itertools

import pytest
import torch

from approxdrop_lightning import functional
from approxdrop_lightning.ops.native import library as native
from approxdrop_lightning.ops.row_linear.groups import GroupedLinear
from approxdrop_lightning.ops.row_linear.one_pass import OnePassLinear, linear_between
from approxdrop_lightning.patterns.row import RowPattern

needs_library = pytest.mark.skipif(native.library() is None, reason="no compiled kernels on this machine")


def interleaved(n, dp, keep, orders, block_size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(-(-n // block_size), generator=generator) for _ in range(orders)])
    return RowPattern(n, dp, seed % dp, keep, True, order if orders > 1 else order[0], block_size)


@pytest.fixture
def ran(monkeypatch):
    """Records the names of the compiled functions that are called."""
    names, run = [], OnePassLinear.run

    def note(self, name, *args):
        done = run(self, name, *args)
        names.extend([name] * done)
        return done

    monkeypatch.setattr(OnePassLinear, "run", note)
    return names


def check(in_pattern, out_pattern, leading, transposed=False, threads=2, tolerance=1e-4):
    """Outputs and all gradients of a layer between two patterns; a number of units means that all are kept."""
    generator = torch.Generator().manual_seed(1)
    (n_in, in_pattern), (n_out, out_pattern) = (
        (p, None) if isinstance(p, int) else (p.n, p) for p in (in_pattern, out_pattern)
    )
    x, bias = torch.randn(*leading, n_in, generator=generator), torch.randn(n_out, generator=generator)
    weight = torch.randn(n_in, n_out, generator=generator).t() if transposed else torch.randn(n_out, n_in)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for kind, backend in ((torch.float64, "reference"), (torch.float32, "compact")):
            a, w, b = (t.to(kind) for t in tensors)
            a = a if in_pattern is None else functional.pack(a, in_pattern, backend)
            y = functional.row_linear(a, w, b, in_pattern, out_pattern, backend=backend, leading_shape=leading)
            direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            results.append([y, *torch.autograd.grad((y * direction.to(kind)).sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    for name, want, got in zip(("y", "x", "weight", "bias"), *results, strict=True):
        largest = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(
            got.double(), want.double(), rtol=1e-4, atol=tolerance * (1 + largest),
            msg=lambda m, n=name: f"{n} between {in_pattern} and {out_pattern}: {m}",
        )  # fmt: skip


def between(n_in, n_out, dp, keep, orders):
    """Patterns of the inputs, of the outputs, and of both; those of a layer have the same groups."""
    inputs, outputs = interleaved(n_in, dp, keep, orders), interleaved(n_out, dp, keep, orders, seed=1)
    return [(inputs, n_out), (n_in, outputs), (inputs, outputs)]


@needs_library
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("n", "n_out"),
    [
        (64, 48),
        (100, 33),  # neither is a number of whole panels
        (16, 1),  # one panel
        (7, 5),  # less than one
        (650, 1000),  # tasks for the threads
    ],
)
def test_products_of_kept_panels(n, n_out, ran):
    for (dp, keep), orders in itertools.product([(2, 1), (3, 2), (10, 3), (10, 7)], [1, 4]):
        for patterns in between(n, n_out, dp, keep, orders):
            for leading in [(35, 4)] if n == 650 else [(3, 5), (40,), (1, 1)]:
                check(*patterns, leading)
    assert set(ran) == {"product", "input_grad", "weight_grad"}


@needs_library
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", range(3))
def test_more_depth_and_rows_than_stay_in_the_caches(kind, ran):
    check(*between(5000, 20, 10, 3, 2)[kind], (24,))
    check(*between(20, 5000, 2, 1, 2)[kind], (24,))
    check(*between(40, 50, 10, 7, 2)[kind], (1500, 3))
    assert len(ran) == 3 * 3


@needs_library
def test_blocks_of_several_panels_strided_weights_and_one_thread(ran):
    check(interleaved(150, 3, 1, 2, block_size=32), 40, (5, 9))
    check(RowPattern(150, 3, 1, 1, True, None, 48), 40, (45,))  # in their natural order
    for patterns in between(100, 70, 2, 1, 3):
        check(*patterns, (5, 9), transposed=True)
    for patterns in between(100, 70, 10, 7, 3):
        check(*patterns, (30, 9), threads=1)
    assert len(ran) == 8 * 3


def test_only_where_interleaved_units_are_whole_panels():
    fitting, narrow = interleaved(64, 2, 1, 2), interleaved(64, 2, 1, 2, block_size=8)
    shared = RowPattern(64, 2, 0, order=torch.randperm(4), block_size=16)
    for in_pattern, out_pattern, kind in (
        (fitting, None, OnePassLinear),
        (None, fitting, OnePassLinear),
        (fitting, fitting, OnePassLinear),
        (None, None, GroupedLinear),
        (narrow, None, GroupedLinear),
        (fitting, narrow, GroupedLinear),
        (shared, None, GroupedLinear),
        (fitting, shared, GroupedLinear),
    ):
        assert type(linear_between(in_pattern, out_pattern, (6,), torch.empty(64, 64))) is kind


@needs_library
@pytest.mark.parametrize("kind", range(3))
def test_results_do_not_depend_on_threads(kind):
    (pattern, outputs), leading = between(320, 500, 10, 3, 4)[kind], (30, 20)
    pattern, outputs = (None if isinstance(p, int) else p for p in (pattern, outputs))
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*leading, 320, generator=generator), torch.randn(500, 320, generator=generator)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        a, w = x if pattern is None else functional.pack(x, pattern), weight.clone().requires_grad_()
        a = a.clone().requires_grad_()
        y = functional.row_linear(a, w, None, pattern, outputs, leading_shape=leading)
        found.append([y, *torch.autograd.grad(y.square().sum(), [a, w])])
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for results in found[1:] for one, other in zip(found[0], results, strict=True))


def test_other_types_and_a_machine_without_compiler_are_served_by_groups(ran, monkeypatch):
    pattern = interleaved(64, 3, 1, 2)
    packed = functional.pack(torch.randn(3, 5, 64, dtype=torch.float64), pattern).requires_grad_()
    weight = torch.randn(8, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, w: functional.row_linear(a, w, None, pattern, leading_shape=(3, 5)), (packed, weight)
    )
    monkeypatch.setattr("approxdrop_lightning.ops.native.product.library", lambda: None)
    check(pattern, 40, (3, 5))
    assert not ran


@needs_library
@pytest.mark.parametrize(("lanes", "rows"), [(8, 6), (16, 12)])
def test_the_vectors_of_other_processors(lanes, rows, tmp_path, monkeypatch):
    """The code paths for both widths of vectors, the wider of which the compiler emulates if need be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, f"-DLANES={lanes}", f"-DROWS={rows}"))
    wide = native.library.__wrapped__()
    assert wide is not None
    monkeypatch.setattr("approxdrop_lightning.ops.native.product.library", lambda: wide)
    for patterns in [*between(100, 70, 10, 3, 2), *between(650, 33, 2, 1, 3)]:
        check(*patterns, (20, 9))
