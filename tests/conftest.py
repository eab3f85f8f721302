"""What must be chosen before anything imports torch or triton, and what the processes of a session have in common."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU, Triton kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# As train.py does: the configs that tests compose start from it.
from approxdrop_lightning.application.config import register

register()


@pytest.fixture(autouse=True)
def _device(request):
    """Tests of kernels run on the GPU, where there is one."""
    on_gpu = torch.cuda.is_available() and request.node.get_closest_marker("triton")
    torch.set_default_device("cuda" if on_gpu else None)
    yield
    torch.set_default_device(None)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that an op asks for is NaN: an entry that it forgets to write cannot pass for zero."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    fill = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr("approxdrop_lightning.ops.native.buffers._KEEP_FROM_BYTES", 1 << 62)  # buffers are new, too


def pytest_sessionfinish(session):
    """Hand what a process has counted to the one that prints it."""
    from support.fuzz import OUTCOMES, TRIED

    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = dict(TRIED), {name: dict(said) for name, said in OUTCOMES.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Add up what the processes have counted."""
    from support.fuzz import OUTCOMES, TRIED

    tried, outcomes = getattr(node, "workeroutput", {}).get("tried", ({}, {}))
    TRIED.update(tried)
    for name, said in outcomes.items():
        OUTCOMES[name].update(said)


def pytest_terminal_summary(terminalreporter):
    """Say how many inputs the properties were tried on."""
    from support.fuzz import OUTCOMES, TRIED

    if TRIED:
        terminalreporter.section("inputs tried")
        for name, count in TRIED.items():
            said = ", ".join(f"{what}: {n:,}" for what, n in sorted(OUTCOMES[name].items()))
            terminalreporter.write_line(f"{count:>8,} {name}{f' ({said})' if said else ''}")
        terminalreporter.write_line(f"{TRIED.total():>8,} in all")
