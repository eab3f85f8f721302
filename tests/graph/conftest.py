"""Fixtures of the tests of compiled graphs."""

import gc

import pytest
import torch
from torch._dynamo.utils import counters

from approxdrop_lightning.graph import doors
from approxdrop_lightning.graph.counts import COUNTS


@pytest.fixture
def fresh_compiler():
    """Start without compiled graphs, counters, or settings that models of other tests have left changed."""
    gc.collect()
    for serial in list(doors.CHARGE._graphs):  # models that were never restored, and are still referenced
        doors.CHARGE.give(serial)
    torch.compiler.reset()
    counters.clear()
    COUNTS.clear()
    yield
    torch.compiler.reset()
