"""Copies of submatrices equal indexing, bit for bit."""

import pytest
import torch
from support.kernels import needs_compiler

from approxdrop_lightning.ops.native import copies, product
from approxdrop_lightning.ops.native.product import Submatrix
from approxdrop_lightning.patterns.units import Units


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_take_and_put_are_indexing(dtype, compiled, threads, monkeypatch):
    if not compiled:
        monkeypatch.setattr(copies, "library", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    matrix = torch.randn(300, 130).to(dtype)
    starts, lengths = torch.tensor([128, 3, 40, 64]), torch.tensor([2, 16, 1, 30])
    columns = Units(starts, lengths, 49)
    rows = Units(torch.tensor([7, 250, 0, 100]), torch.tensor([1, 40, 6, 90]), 137)
    try:
        for r in (rows, Units.every(300)):
            for c in (columns, Units.every(130)):
                expected = matrix[r.index][:, c.index]
                assert torch.equal(copies.take(matrix, r, c), expected)
                for clear in (True, False):
                    target, wanted = torch.ones_like(matrix), torch.ones_like(matrix)
                    if clear:
                        wanted[r.index] = 0
                    wanted[r.index[:, None], c.index] = expected
                    copies.put(target, r, c, expected, clear)
                    assert torch.equal(target, wanted)
        assert torch.equal(copies.take(matrix.t(), Units.every(130), Units.every(300)), matrix.t())
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("n", [1037, 1040])  # rows unaligned, and aligned to cache lines
def test_what_is_written_past_the_caches_is_all_of_it_and_nothing_else(n, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, columns = (Units(*fields) for fields in (_ranges(700, generator), _ranges(n, generator)))
    a, b = torch.randn(rows.count, 40, generator=generator), torch.randn(40, columns.count, generator=generator)
    for large in (False, True):
        monkeypatch.setattr(copies, "_LARGE", 0 if large else 1 << 62)
        matrix = torch.ones(1400, n)
        target = matrix[-700:]
        wanted = target.clone()
        wanted[rows.index[:, None], columns.index] = 0
        copies.zero(target, rows, columns)
        assert torch.equal(target, wanted)
        out = Submatrix(target, rows, columns)
        product.multiply([(Submatrix.whole(a), Submatrix.whole(b), out, False)], past_caches=True)
        wanted[rows.index[:, None], columns.index] = a @ b
        torch.testing.assert_close(target, wanted, rtol=1e-5, atol=1e-4)
        assert matrix[:-700].eq(1).all()
    every = torch.ones(700, n)
    copies.zero(every, Units.every(700), Units.every(n))
    assert not every.any()


def _ranges(n, generator):
    """Starts, lengths and number of units: shuffled blocks of 16, one of them shorter."""
    starts = torch.randperm(n // 16, generator=generator)[: n // 20] * 16
    lengths = torch.full_like(starts, 16)
    lengths[3] = 5
    return starts, lengths, int(lengths.sum())
