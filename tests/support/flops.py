"""Counting the operations that a step executes."""

import copy

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from approxdrop_lightning import approximate, resample
from approxdrop_lightning.ops.native.library import library


class Flops(TorchDispatchMode):
    """FlopCounterMode's formulas without its module hooks, which read every output and thereby make it dense."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def executed_share(model, x, monkeypatch, **options):
    """Operations of a training step that are executed when a model is converted, relative to the stock model's."""
    monkeypatch.setenv("APPROXDROP_NATIVE", "0")  # PyTorch counts nothing of compiled code
    library.cache_clear()
    executed = []
    for convert in (False, True):
        one = copy.deepcopy(model)
        if convert:
            approximate(one, seed=0, **options)
            resample(one)
        with Flops() as flops:
            one(x).sum().backward()
        executed.append(flops.total)
    library.cache_clear()
    return executed[1] / executed[0]
