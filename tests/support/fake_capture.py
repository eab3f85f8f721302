"""Fake graph capture without a GPU: recorded work runs only in a replay, on the recorded memory."""

import copy
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves


class FakeCapture:
    """As CUDA has it: recording changes nothing and leaves results unwritten; a replay fills them.

    Args:
        kept: Modules and optimizers that a step changes.
    """

    def __init__(self, *kept):
        self.kept, self.recorded, self.recording = list(kept), 0, False

    @contextmanager
    def _undone(self):
        states = [copy.deepcopy(one.state_dict()) for one in self.kept]
        rng = torch.get_rng_state()
        self.recording = True
        try:
            yield
        finally:
            self.recording = False
            for one, state in zip(self.kept, states, strict=True):
                one.load_state_dict(state)
            torch.set_rng_state(rng)

    def warm_up(self, run):
        return run()

    def capture(self, run):
        with self._undone():
            result = run()
        self.recorded += 1
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        with torch.no_grad():
            for leaf in leaves:
                leaf.fill_(float("nan") if leaf.is_floating_point() else -1)

        def replay():
            found = [leaf for leaf in tree_leaves(run()) if isinstance(leaf, torch.Tensor)]
            with torch.no_grad():
                for leaf, value in zip(leaves, found, strict=True):
                    leaf.copy_(value)

        return result, replay
