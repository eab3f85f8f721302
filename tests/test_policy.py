"""When skipping gains."""

import pytest
import torch
from support.skipping import set_thresholds

from approxdrop_lightning.options import Options
from approxdrop_lightning.policy import THRESHOLDS, Policy, measured, product_dtype, tiles_gain_by_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_thresholds_depend_on_device_and_type():
    assert measured(CPU, torch.bfloat16) is measured(CPU, torch.float32) is THRESHOLDS["cpu"]
    assert measured(CUDA, torch.float32) is THRESHOLDS["cuda"]
    assert measured(CUDA, torch.bfloat16) is THRESHOLDS["tensor cores"]
    assert tiles_gain_by_triton(CUDA, torch.bfloat16)
    assert not tiles_gain_by_triton(CUDA, torch.float32) and not tiles_gain_by_triton(CPU, torch.bfloat16)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert measured(CUDA, torch.float32) is THRESHOLDS["tensor cores"]
        assert measured(CUDA, torch.float64) is THRESHOLDS["cuda"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_products_are_of_the_type_of_autocast():
    assert product_dtype(CPU, torch.float32) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(CPU, torch.float32) == torch.bfloat16


def test_each_question_has_a_threshold_of_its_own(monkeypatch):
    set_thresholds(
        monkeypatch,
        saved=10,
        saved_lstm=20,
        saved_tiles=30,
        saved_compiled=40,
        features=5,
        side=5,
        hidden=6,
        sequence=8,
        whole=2,
    )
    ask = Policy().at(CPU, torch.float32)
    for answer, least in ((ask.product, 10), (ask.lstm, 20), (ask.compiled, 40)):
        assert answer(least) is None
        assert answer(least - 1) == f"{least - 1} multiplies saved are too few to gain (fewer than {least})"
    assert ask.units(5) is None and ask.units(4) == "4 features are too few to gain (fewer than 5)"
    assert ask.recurrence(6) is None and "hidden size 5" in ask.recurrence(5)
    assert ask.units(8, of_sequences=True) is None and "7 features" in ask.units(7, of_sequences=True)
    assert ask.tiles((5, 9), 30) is None
    assert "a side of 4" in ask.tiles((4, 9), 30) and "29 multiplies" in ask.tiles((5, 9), 29)
    for saved, lstm, tiles, gains in ((10, False, False, True), (9, True, False, False), (29, False, True, False)):
        assert (ask.any_product(saved, lstm, tiles) is None) == gains
    assert ask.together([30, 10], whole=20) is None
    assert "40 multiplies saved are fewer" in ask.together([30, 10], whole=21)


@pytest.mark.parametrize("least", [0, 1000])
def test_min_gain_is_all_that_counts_if_it_is_given(least):
    ask = Options(min_gain=least).policy.at(CPU, torch.float32)
    assert ask.units(1, of_sequences=True) is ask.recurrence(1) is ask.together([0], whole=9) is None
    for answer in (ask.product, ask.lstm, ask.compiled, lambda saved: ask.tiles((1, 1), saved)):
        assert answer(least) is None and (not least or answer(least - 1) is not None)


def test_deprecated_options_replace_one_threshold_each():
    table = THRESHOLDS["cpu"]
    for option, changed in (
        ("min_multiplies", {"saved": 7, "saved_compiled": 7, "saved_replayed": 7}),
        ("min_features", {"features": 7, "side": 7}),
        ("min_hidden", {"hidden": 7}),
    ):
        assert vars(Options(**{option: 7}).policy.at(CPU, torch.float32)) == vars(table) | changed
    no_width = Options(min_features=0).policy.at(CPU, torch.float32)
    assert vars(no_width) == vars(table) | {"features": 0, "side": 0, "sequence": 0}
    assert Options().policy.at(CPU, torch.float32) is table


def test_other_thresholds_are_another_state(monkeypatch):
    before = Options().policy.state()
    assert before == Options(orders=1).policy.state() != Options(min_gain=0).policy.state()
    set_thresholds(monkeypatch, saved=1)
    assert Options().policy.state() != before
