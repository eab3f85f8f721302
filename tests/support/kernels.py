"""Fixture for tests with and without the compiled kernels."""

import shutil

import pytest

from approxdrop_lightning.ops.lstm import compact as lstm_ops
from approxdrop_lightning.ops.native import copies, product
from approxdrop_lightning.ops.native import library as native

# If there is a compiler, sources that do not compile are a failure.
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)


@pytest.fixture(params=["compiled", "plain"])
def kernels(request, monkeypatch):
    """Run a test with and without the compiled kernels."""
    if request.param == "plain":
        for module in (copies, product, lstm_ops):
            monkeypatch.setattr(module, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler on this machine")
