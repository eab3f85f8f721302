"""`multiply` against plain indexing, for every layout of a submatrix in its matrix."""

import itertools

import pytest
import torch

from approxdrop_lightning.ops.native.product import Submatrix, multiply
from approxdrop_lightning.patterns.row import RowPattern
from approxdrop_lightning.patterns.units import Units


def units(kind: str, n: int, seed: int) -> Units:
    """All of `n` units, every third one, or half of the blocks of four in shuffled order."""
    if kind == "all":
        return Units.every(n)
    if kind == "strided":
        return RowPattern(n, 3, 1).units(0)
    order = torch.randperm(-(-n // 4), generator=torch.Generator().manual_seed(seed))
    return RowPattern(n, 2, 0, interleave=True, order=order, block_size=4).units(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kinds", list(itertools.product(["all", "strided", "blocks"], repeat=3)))
@pytest.mark.parametrize(("transposed", "add"), [((False, True), False), ((True, False), True)])
@pytest.mark.parametrize(
    "sizes",
    [
        (45, 67, 50),  # nothing is a multiple of a vector
        (1, 5, 3),  # less than a tile
        (301, 907, 1205),  # several blocks, depths and tasks for the threads
    ],
)
def test_product_of_submatrices(kinds, sizes, transposed, add, dtype):
    rows, inner, columns = (units(kind, n, i) for i, (kind, n) in enumerate(zip(kinds, sizes, strict=True)))
    m, k, n = sizes
    a = torch.randn(k, m, dtype=dtype).t() if transposed[0] else torch.randn(m, k, dtype=dtype)
    b = torch.randn(n, k, dtype=dtype).t() if transposed[1] else torch.randn(k, n, dtype=dtype)
    out, bias = torch.randn(m, n, dtype=dtype), torch.randn(2 * n, dtype=dtype)[::2]
    wanted = out.double()
    product = a.double()[rows.index][:, inner.index] @ b.double()[inner.index][:, columns.index]
    product += bias.double()[columns.index]
    place = rows.index[:, None], columns.index
    wanted[place] = wanted[place] + product if add else product
    multiply([(Submatrix(a, rows, inner), Submatrix(b, inner, columns), Submatrix(out, rows, columns), add)], bias)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5 * k if dtype == torch.float32 else 1e-10)
