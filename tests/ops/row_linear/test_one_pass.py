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


def check(pattern, n_out, leading, transposed=False, threads=2, tolerance=1e-4):
    """Outputs and all gradients of a layer whose inputs the pattern drops."""
    generator = torch.Generator().manual_seed(1)
    n_in = pattern.n
    x, bias = torch.randn(*leading, n_in, generator=generator), torch.randn(n_out, generator=generator)
    weight = torch.randn(n_in, n_out, generator=generator).t() if transposed else torch.randn(n_out, n_in)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for kind, backend in ((torch.float64, "reference"), (torch.float32, "compact")):
            a, w, b = (t.to(kind) for t in tensors)
            a = functional.pack(a, pattern, backend)
            y = functional.row_linear(a, w, b, pattern, backend=backend, leading_shape=leading)
            direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            results.append([y, *torch.autograd.grad((y * direction.to(kind)).sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    for name, want, got in zip(("y", "x", "weight", "bias"), *results, strict=True):
        torch.testing.assert_close(
            got.double(), want.double(), rtol=1e-4, atol=tolerance * (1 + want.abs().max().item()),
            msg=lambda m, n=name: f"{n} of {pattern}: {m}",
        )  # fmt: skip


@needs_library
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("n", "n_out"),
    [
        (64, 48),
        (100, 33),  # neither is a number of whole panels
        (16, 1),  # one panel
        (7, 5),  # less than one
        (650, 1000),  # several blocks of depth, tasks for the threads
    ],
)
def test_products_of_kept_panels(n, n_out, ran):
    for (dp, keep), orders in itertools.product([(2, 1), (3, 2), (10, 3), (10, 7)], [1, 4]):
        for leading in [(35, 20)] if n == 650 else [(3, 5), (40,), (1, 1)]:
            check(interleaved(n, dp, keep, orders), n_out, leading)
    assert set(ran) == {"one_pass_product", "one_pass_input_grad", "one_pass_weight_grad"}


@needs_library
def test_blocks_of_several_panels_strided_weights_and_one_thread(ran):
    check(interleaved(150, 3, 1, 2, block_size=32), 40, (5, 9))
    check(RowPattern(150, 3, 1, 1, True, None, 48), 40, (45,))  # in their natural order
    check(interleaved(100, 2, 1, 3), 70, (5, 9), transposed=True)
    check(interleaved(100, 10, 7, 3), 70, (30, 9), threads=1)
    assert len(ran) == 4 * 3


def test_only_where_interleaved_inputs_are_whole_panels_and_all_outputs_are_wanted():
    fitting = interleaved(64, 2, 1, 2)
    shared = RowPattern(64, 2, 0, order=torch.randperm(4), block_size=16)
    for in_pattern, out_pattern, kind in (
        (fitting, None, OnePassLinear),
        (None, fitting, GroupedLinear),
        (fitting, fitting, GroupedLinear),
        (None, None, GroupedLinear),
        (interleaved(64, 2, 1, 2, block_size=8), None, GroupedLinear),
        (shared, None, GroupedLinear),
    ):
        assert type(linear_between(in_pattern, out_pattern, (6,), torch.empty(64, 64))) is kind


@needs_library
def test_results_do_not_depend_on_threads():
    pattern, leading = interleaved(320, 10, 3, 4), (30, 20)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(*leading, 320, generator=generator), torch.randn(500, 320, generator=generator)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        a, w = functional.pack(x, pattern).requires_grad_(), weight.clone().requires_grad_()
        y = functional.row_linear(a, w, None, pattern, leading_shape=leading)
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
def test_the_wider_vectors_of_other_processors(tmp_path, monkeypatch):
    """The AVX-512 code path, which the compiler emulates with this processor's instructions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-DLANES=16", "-DROWS=12"))
    wide = native.library.__wrapped__()
    assert wide is not None
    monkeypatch.setattr("approxdrop_lightning.ops.native.product.library", lambda: wide)
    check(interleaved(100, 10, 3, 2), 70, (30, 9))
    check(interleaved(650, 2, 1, 3), 33, (20, 9))
