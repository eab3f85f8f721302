"""Packing and unpacking: the definition against loops, operators and kernels (in the interpreter) against it."""

import subprocess
import sys

import pytest
import torch
from support import ROOT, compiler_environment

from approxdrop_lightning.ops.pack import pack_ops, reference

#: (n, groups, kept of a group, layers, run): disjoint groups, a layer for each, overlapping ones, more than a block.
TABLES = {
    "two groups": (64, 2, 32, 1, 1),
    "blocks": (96, 3, 32, 1, 16),
    "odd": (37, 3, 11, 1, 1),
    "orders": (64, 4, 32, 2, 8),
    "overlapping": (50, 2, 31, 2, 1),
    "nothing kept": (5, 2, 0, 1, 1),
    "wide": (140, 2, 68, 1, 4),
}
SIDES = ["both", "rows", "columns"]


def table(n, groups, width, layers, run, padding=False):
    """Random runs of neighbours; within a layer groups are disjoint."""
    of_a_layer, found = groups // layers, []
    for _ in range(layers):
        units = (torch.randperm(n // run)[:, None] * run + torch.arange(run)).view(-1)
        found += [units[g * width : (g + 1) * width] for g in range(of_a_layer)]
    kept = torch.stack(found).to(torch.int32)
    if padding and width > run:
        kept[-1, -run:] = -1
    return kept


def tables(name, sides, padding=False):
    n, groups, width, layers, run = TABLES[name]
    rows = None if sides == "columns" else table(n, groups, width, layers, 1, padding)
    columns = None if sides == "rows" else table(n, groups, width, layers, run, padding)
    inverse = [None if t is None else reference.slots(t, n, layers) for t in (rows, columns)]
    return n, rows, columns, *inverse, run


def loops(packed, rows, columns, n):
    """Sum of the groups, entry by entry; and how often each is held."""
    dense, held = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.int64)
    for g, part in enumerate(packed.double()):
        r = torch.arange(n) if rows is None else rows[g].long()
        c = torch.arange(n) if columns is None else columns[g].long()
        at = (r[r >= 0][:, None], c[c >= 0][None, :])
        dense[at] += part[r >= 0][:, c >= 0]
        held[at] += 1
    return dense, held


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", TABLES)
def test_the_definition_is_what_loops_do(name, sides, padding):
    n, rows, columns, row_slots, column_slots, _ = tables(name, sides, padding)
    dense = torch.rand(n, n) + 0.5  # no zeros: those of the packed matrix are padding
    packed = reference.pack(dense, rows, columns)
    summed, held = loops(packed, rows, columns, n)
    torch.testing.assert_close(summed, dense.double() * held)
    found = reference.unpack(packed, row_slots, column_slots, n, n)
    torch.testing.assert_close(found.double(), summed)
    assert (packed == 0).sum() == packed.numel() - held.sum()  # padding, and nothing else


def test_slots_say_where_an_index_lies():
    kept = torch.tensor([[4, 1, -1], [0, 3, 2], [5, 4, 0], [1, -1, -1]])
    assert reference.slots(kept, 6, 2).tolist() == [[3, 1, 5, 4, 0, -1], [8, 9, -1, -1, 7, 6]]
    assert reference.slots(kept, 6, 4).dtype == torch.int32


@pytest.mark.parametrize("call", [reference.pack, lambda *a: reference.unpack(*a, 2, 2), pack_ops.pack])
def test_one_side_at_least(call):
    arguments = (torch.ones(1, 2, 2), None, None) if call not in (reference.pack, pack_ops.pack) else (
        torch.ones(2, 2), None, None, *([None, None] if call is pack_ops.pack else [])
    )  # fmt: skip
    with pytest.raises(ValueError, match="must be given"):
        call(*arguments)


def test_types_without_kernels_are_served_by_the_definition():
    n, *t, run = tables("orders", "both")
    dense = torch.randn(n, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: pack_ops.pack(d, *t, run), (dense,), atol=1e-8)
    packed = torch.randn(4, 32, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: pack_ops.unpack(p, *t, n, n, run), (packed,), fast_mode=True)


pytest.importorskip("triton")

from support.triton_cases import TYPES  # noqa: E402

from approxdrop_lightning.ops.pack import triton_pack  # noqa: E402


@pytest.fixture
def launches(monkeypatch):
    """Kernels that were launched."""
    found, run = [], triton_pack.Launch.run
    monkeypatch.setattr(triton_pack.Launch, "run", lambda launch: (found.append(launch), run(launch))[1])
    return found


def on_device(t):
    return [x.to(torch.get_default_device()) if isinstance(x, torch.Tensor) else x for x in t]


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "padding"), [(torch.float32, True), *((dtype, False) for dtype in TYPES)])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", TABLES)
def test_kernels_are_the_definition(name, sides, padding, dtype, launches):
    """To the last bit where nothing is added up. Memory is NaN before: what is not written would show."""
    n, *t, run = on_device(tables(name, sides, padding))
    rows, columns, row_slots, column_slots = t
    dense = torch.randn(n, n).to(dtype).requires_grad_()
    packed = pack_ops.pack(dense, *t, run)
    wanted = reference.pack(dense.detach(), rows, columns)
    assert torch.equal(packed, wanted)
    (grad,) = torch.autograd.grad(packed, dense, wanted)
    exact = {"rtol": 0, "atol": 0} if TABLES[name][3] == 1 else {}
    torch.testing.assert_close(grad, reference.unpack(wanted, row_slots, column_slots, n, n), **exact)
    values = wanted.clone().requires_grad_()
    found = pack_ops.unpack(values, *t, n, n, run)
    assert torch.equal(found, grad)
    (back,) = torch.autograd.grad(found, values, dense.detach())
    assert torch.equal(back, wanted)
    if packed.numel():
        assert [launch.kernel.fn.__name__ for launch in launches] == [
            "pack_kernel", "unpack_kernel", "unpack_kernel", "pack_kernel"
        ]  # fmt: skip


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("config", range(len(triton_pack._CONFIGS)))
def test_every_configuration(config, monkeypatch):
    """What is chosen by timing on a GPU computes the same."""
    n, *t, run = on_device(tables("wide", "both"))
    dense = torch.randn(n, n)
    packed = torch.full((2, 68, 68), float("nan"))
    found = torch.full((n, n), float("nan"))
    launched = (
        triton_pack.pack_launch(dense, packed, t[0], t[1], run),
        triton_pack.unpack_launch(packed, found, t[2], t[3], run),
    )
    for launch in launched:
        monkeypatch.setattr(launch.kernel, "configs", [triton_pack._CONFIGS[config]])
        launch.run()
    torch.testing.assert_close(packed, reference.pack(dense, t[0], t[1]), rtol=0, atol=0)
    torch.testing.assert_close(found, reference.unpack(packed, t[2], t[3], n, n), rtol=0, atol=0)


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
def test_the_type_changes_on_the_way():
    """A float32 weight packed for products in 16 bits; its gradient is float32 again."""
    n, *t, run = on_device(tables("blocks", "both"))
    dense = torch.randn(n, n, requires_grad=True)
    packed = pack_ops.pack(dense, *t, run, torch.float16)
    assert packed.dtype == torch.float16
    assert torch.equal(packed, reference.pack(dense.detach(), t[0], t[1], torch.float16))
    (grad,) = torch.autograd.grad(packed, dense, packed.detach())
    assert grad.dtype == torch.float32
    assert torch.equal(grad, reference.unpack(packed.detach(), t[2], t[3], n, n, torch.float32))


@pytest.mark.triton
@pytest.mark.usefixtures("poisoned")
def test_strided_operands_and_int64_tables():
    n, *t, run = on_device(tables("blocks", "both"))
    t = [x.to(torch.int64) for x in t]
    wide = torch.randn(n, n + 3)[:, 1 : n + 1]  # rows lie apart, and start anywhere
    turned = torch.randn(n, n).t()
    for dense in (wide, turned):
        assert torch.equal(pack_ops.pack(dense, *t, run), reference.pack(dense, t[0], t[1]))
    packed = torch.randn(3, 32, 32).transpose(1, 2)
    torch.testing.assert_close(pack_ops.unpack(packed, *t, n, n, run), reference.unpack(packed, t[2], t[3], n, n))


@pytest.mark.triton
@pytest.mark.parametrize("sides", SIDES)
def test_operators_keep_their_promises(sides):
    n, *t, run = on_device(tables("orders", sides))
    dense = torch.randn(n, n, requires_grad=True)
    torch.library.opcheck(pack_ops.pack.op, (dense, *t, run, None))
    packed = pack_ops.pack(dense, *t, run).detach().requires_grad_()
    torch.library.opcheck(pack_ops.unpack.op, (packed, *t, n, n, run, None))


@pytest.mark.triton
def test_one_compiled_graph_takes_other_patterns_in_place():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    n, *t, run = on_device(tables("blocks", "both"))
    weight = torch.randn(n, n, requires_grad=True)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(weight, rows, columns, row_slots, column_slots):
        return pack_ops.pack(weight * 2, rows, columns, row_slots, column_slots, run)

    for _ in range(3):
        _, *others, _ = on_device(tables("blocks", "both"))
        for table_, other in zip(t, others, strict=True):
            table_.copy_(other)
        packed = compiled(weight, *t)
        assert torch.equal(packed, 2 * reference.pack(weight.detach(), t[0], t[1]))
        (grad,) = torch.autograd.grad(packed.sum(), weight)
        assert torch.equal(grad, 2 * reference.unpack(torch.ones_like(packed), t[2], t[3], n, n))
    assert counter.frame_count == 1


COMPILATIONS = """
import torch
from approxdrop_lightning.ops.pack.triton_pack import pack_launch, unpack_launch
from support.triton_cases import compilations

n, packs, unpacks = 16 * 16 * 15 * 7, [], []
dense = torch.empty(n, n, dtype=torch.float16, device="meta")
for groups in range(1, 9):
    for kept in range(16, n // groups, 16 * 16 * 5):
        packed = dense.new_empty(groups, kept, kept)
        table = torch.empty(groups, kept, dtype=torch.int32, device="meta")
        slots = torch.empty(1 + groups % 2, n, dtype=torch.int32, device="meta")
        packs.append(pack_launch(dense, packed, table, table, 16))
        unpacks.append(unpack_launch(packed, dense, slots, slots, 16))
print(len(packs) > 50, compilations(packs), compilations(unpacks))
"""


@pytest.mark.triton
def test_no_compilation_for_another_pattern():
    done = subprocess.run(
        [sys.executable, "-c", COMPILATIONS], env=compiler_environment() | {"PYTHONPATH": "tests:."},
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "True 1 1\n", done.stderr
