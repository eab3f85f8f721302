"""The pack and unpack kernels, as compiled graphs on CUDA call them, against the gathers of everywhere else."""

import os
import subprocess
import sys

import pytest
import torch
from support import ROOT
from support.graph_uses import two_uses

from approxdrop_lightning.graph import kernels
from approxdrop_lightning.graph.weights import KeptWeights
from approxdrop_lightning.ops.pack import reference

pytest.importorskip("triton")
pytestmark = pytest.mark.triton

#: (dp, keep, orders): disjoint groups, overlapping ones, cells of a fraction of a block, several orders.
LAYOUTS = [(2, 1, 1), (2, 1, 4), (3, 1, 2), (3, 2, 1), (3, 2, 2), (10, 7, 3)]


@pytest.mark.parametrize("sides", ["both", "outputs", "inputs"])
@pytest.mark.parametrize("pattern", LAYOUTS)
def test_kernels_pack_and_unpack_as_gathers_do(pattern, sides, poisoned):
    (outside, inside), table = two_uses(*pattern)
    outside, inside = outside if sides != "inputs" else None, inside if sides != "outputs" else None
    weight = torch.randn(160, 160, requires_grad=True)
    wanted = KeptWeights.apply(weight, table, outside, inside, 1)
    assert wanted.numel() < (outside or inside).layout.all_groups * weight.numel()  # something is left out
    torch.testing.assert_close(kernels.pack(weight.detach(), table, outside, inside), wanted, rtol=0, atol=0)
    grad = torch.randn_like(wanted)
    (dense,) = torch.autograd.grad(wanted, weight, grad)
    torch.testing.assert_close(kernels.unpack(grad, table, outside, inside, (160, 160)), dense)


@pytest.mark.parametrize("pattern", LAYOUTS)
def test_slots_are_the_inverse_of_units(pattern):
    (use, _), table = two_uses(*pattern)
    layers = use.layout.orders if use.layout.disjoint else use.layout.all_groups
    wanted = reference.slots(kernels._units(use, table), use.layout.n, layers)
    assert torch.equal(kernels._slots(use, table, use.layout.disjoint), wanted)


TRACE = """
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from approxdrop_lightning.graph import kernels
from approxdrop_lightning.graph.weights import KeptWeights
from support.graph_uses import two_uses

(outside, inside), table = two_uses(2, 1, 1)
def both(weight, table):
    return kernels.unpack(kernels.pack(weight, table, outside, inside), table, outside, inside, (160, 160))
graph = make_fx(both, tracing_mode="fake")(torch.randn(160, 160), table)
print(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
"""


def test_compilers_see_the_kernels():
    """Traced, each is a launch that a compiler schedules, not an opaque operator; not so in the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    result = subprocess.run(
        [sys.executable, "-c", TRACE], env=environment,
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert result.stdout == "2\n", result.stderr
