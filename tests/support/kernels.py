"""Tests with the compiled kernels and without."""

import pytest

from approxdrop_lightning.ops.lstm import compact as lstm_ops
from approxdrop_lightning.ops.native import copies
from approxdrop_lightning.ops.native import library as native


@pytest.fixture(params=["compiled", "plain"])
def kernels(request, monkeypatch):
    """With the compiled kernels and without."""
    if request.param == "plain":
        monkeypatch.setattr(copies, "library", lambda: None)
        monkeypatch.setattr(lstm_ops, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C compiler on this machine")
