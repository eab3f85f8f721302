"""How a launch chooses a configuration of an autotuned kernel; timing is faked, the kernel interpreted."""

import pytest
import torch

pytest.importorskip("triton")

from approxdrop_lightning.ops.pack import reference, triton_pack
from approxdrop_lightning.ops.triton.launch import Launch

pytestmark = pytest.mark.triton


@pytest.fixture
def timed(monkeypatch):
    """As on a GPU: configurations are timed, the third is the fastest."""
    kernel = triton_pack.pack_kernel
    monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setattr(kernel, "_do_bench", lambda call, quantiles: (call(), [1.0, 1.0, 1.0])[1])
    order, bench = [], kernel._bench

    def measure(*args, config, **meta):
        order.append(config)
        bench(*args, config=config, **meta)
        return [0.5 if len(order) == 3 else 1.0] * 3

    monkeypatch.setattr(kernel, "_bench", measure)
    monkeypatch.setattr(Launch, "_may_time", lambda launch: True)
    return order


def launch(n=48):
    table = torch.randperm(n)[: n // 2].view(1, -1).to(torch.int32)
    dense, packed = torch.randn(n, n), torch.full((1, n // 2, n // 2), float("nan"))
    return triton_pack.pack_launch(dense, packed, table, table), reference.pack(dense, table, table)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the interpreter is off")
def test_timed_once_and_then_taken_also_within_a_capture(timed, monkeypatch):
    first, wanted = launch()
    first.run()
    assert torch.equal(first.arguments["packed"], wanted)
    assert timed == triton_pack._CONFIGS
    # Under the key that Triton used.
    assert triton_pack.pack_kernel.cache == {first.tuning_key(): triton_pack._CONFIGS[2]}
    monkeypatch.setattr(Launch, "_may_time", lambda launch: False)
    taken = []
    grid = triton_pack.pack_kernel.fn
    monkeypatch.setattr(type(grid), "__getitem__", lambda kernel, grid: lambda **call: taken.append(call))
    launch()[0].run()
    launch(64)[0].run()  # of other sizes: not timed, so the first
    assert [call["ROWS"] for call in taken] == [
        c.kwargs["ROWS"] for c in (triton_pack._CONFIGS[2], triton_pack._CONFIGS[0])
    ]
    assert len(timed) == 4


def test_nothing_is_timed_off_a_gpu_or_when_told_so(monkeypatch):
    one, _ = launch()
    assert not one._may_time() or torch.cuda.is_available()
    monkeypatch.setenv("APPROXDROP_AUTOTUNE", "0")
    assert not one._may_time()
