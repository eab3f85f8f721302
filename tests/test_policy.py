"""When skipping pays."""

import torch

from approxdrop_lightning import policy


def test_the_least_product_depends_on_device_and_type(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    least = policy.least_saved(cuda, torch.float32)
    assert policy.least_saved(cpu, torch.bfloat16) == policy.least_saved(cpu, torch.float32) < least
    assert policy.least_saved(cuda, torch.bfloat16) == 10 * least
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")  # it cannot be without a GPU
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert policy.least_saved(cuda, torch.float32) == 10 * least
    assert policy.least_saved(cpu, torch.float32) < least
