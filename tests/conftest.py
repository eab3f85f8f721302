"""Settings that must precede the import of torch or triton, and state shared by the processes of a session."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # the test processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU, Triton kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# As in train.py: the configs that tests compose are based on it.
from approxdrop_lightning.application.config import register

register()


@pytest.fixture(autouse=True)
def _device(request):
    """Run kernel tests on the GPU if there is one."""
    on_gpu = torch.cuda.is_available() and request.node.get_closest_marker("triton")
    torch.set_default_device("cuda" if on_gpu else None)
    yield
    torch.set_default_device(None)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new memory with NaN, so that entries that an op does not write are noticed."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    fill = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr("approxdrop_lightning.ops.native.buffers._KEEP_FROM_BYTES", 1 << 62)  # nor pooled buffers


def pytest_sessionfinish(session):
    """Send the counts of a worker process to the main process."""
    from support.fuzz import OUTCOMES, TRIED

    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tried"] = dict(TRIED), {name: dict(said) for name, said in OUTCOMES.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Add up the counts of the worker processes."""
    from support.fuzz import OUTCOMES, TRIED

    tried, outcomes = getattr(node, "workeroutput", {}).get("tried", ({}, {}))
    TRIED.update(tried)
    for name, said in outcomes.items():
        OUTCOMES[name].update(said)


def pytest_terminal_summary(terminalreporter):
    """Print the number of inputs that the properties were tested on."""
    from support.fuzz import OUTCOMES, TRIED

    if TRIED:
        terminalreporter.section("inputs tried")
        for name, count in TRIED.items():
            said = ", ".join(f"{what}: {n:,}" for what, n in sorted(OUTCOMES[name].items()))
            terminalreporter.write_line(f"{count:>8,} {name}{f' ({said})' if said else ''}")
        terminalreporter.write_line(f"{TRIED.total():>8,} in all")
