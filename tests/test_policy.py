"""When skipping gains."""

import pytest
import torch
from support.skipping import set_thresholds

from approxdrop_lightning.options import Options
from approxdrop_lightning.policy import THRESHOLDS, Policy, thresholds, tiles_gain_by_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KIND = CPU, torch.float32


def test_thresholds_depend_on_device_and_type(monkeypatch):
    assert thresholds(CPU, torch.bfloat16) is thresholds(CPU, torch.float32) is THRESHOLDS["cpu"]
    assert thresholds(CUDA, torch.float32) is THRESHOLDS["cuda"]
    assert thresholds(CUDA, torch.bfloat16) is THRESHOLDS["tensor cores"]
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")  # it cannot be without a GPU
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert thresholds(CUDA, torch.float32) is THRESHOLDS["tensor cores"]
    assert thresholds(CPU, torch.float32) is THRESHOLDS["cpu"]
    assert tiles_gain_by_triton(CUDA, torch.bfloat16)
    assert not tiles_gain_by_triton(CUDA, torch.float32) and not tiles_gain_by_triton(CPU, torch.bfloat16)


def test_each_question_has_a_threshold_of_its_own(monkeypatch):
    set_thresholds(
        monkeypatch, saved=10, saved_lstm=20, saved_tiles=30, saved_compiled=40, features=5, hidden=6, block=8
    )
    ask = Policy()
    for answer, least in ((ask.product, 10), (ask.lstm, 20), (ask.compiled, 40)):
        assert answer(least, *KIND) is None
        assert answer(least - 1, *KIND) == f"{least - 1} multiplies saved are too few to gain (fewer than {least})"
    assert ask.units(5, *KIND) is None and ask.units(4, *KIND) == "4 features are too few to gain (fewer than 5)"
    assert ask.recurrence(6, *KIND) is None and "hidden size 5" in ask.recurrence(5, *KIND)
    assert ask.blocks(100, 8, *KIND) is None and "blocks of 4" in ask.blocks(100, 4, *KIND)
    assert ask.tiles((5, 9), 30, *KIND) is None
    assert "a side of 4" in ask.tiles((4, 9), 30, *KIND) and "29 multiplies" in ask.tiles((5, 9), 29, *KIND)


@pytest.mark.parametrize("least", [0, 1000])
def test_min_gain_is_all_that_counts_if_it_is_given(least):
    ask = Options(min_gain=least).policy
    assert ask.units(1, *KIND) is ask.recurrence(1, *KIND) is ask.blocks(1, 1, *KIND) is None
    for answer in (ask.product, ask.lstm, ask.compiled, lambda *a: ask.tiles((1, 1), *a)):
        assert answer(least, *KIND) is None and (not least or answer(least - 1, *KIND) is not None)


def test_deprecated_options_replace_one_threshold_each():
    table = THRESHOLDS["cpu"]
    for option, changed in (
        ("min_multiplies", {"saved": 7, "saved_compiled": 7}),
        ("min_features", {"features": 7}),
        ("min_hidden", {"hidden": 7}),
    ):
        found = Options(**{option: 7}).policy.thresholds(*KIND)
        assert vars(found) == vars(table) | changed
    assert vars(Options(min_features=0).policy.thresholds(*KIND)) == vars(table) | {"features": 0, "block": 0}
    assert Options().policy.thresholds(*KIND) is table
