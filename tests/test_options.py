"""Names, defaults and texts have a single source for signature, docstring and Hydra config."""

import inspect
import re
from dataclasses import fields

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from support import ROOT
from support.runs_of_train import config

from approxdrop_lightning import ApproxDropout, approximate
from approxdrop_lightning.options import CallbackOptions, Options, check_same_sequence, defaults

NAMES = list(defaults(CallbackOptions))


def test_the_signature_is_that_of_the_options():
    parameters = inspect.signature(ApproxDropout).parameters
    assert {name: p.default for name, p in parameters.items()} == defaults(CallbackOptions)
    assert parameters["max_dp"].annotation is int


@pytest.mark.parametrize("options", [Options, CallbackOptions])
def test_every_option_is_described(options):
    text = inspect.getdoc(ApproxDropout if options is CallbackOptions else options)
    for name in defaults(options):
        assert re.search(rf"^    {name}: \S", text, re.MULTILINE), name
    assert "block_size" not in inspect.getdoc(ApproxDropout)


@pytest.mark.parametrize("dropout", ["row", "tile", "paper", "dropconnect"])
def test_hydra_offers_every_option_with_its_default(tmp_path, dropout):
    given = config(tmp_path, f"dropout={dropout}").dropout
    assert set(given) == {*NAMES, "name", "_target_"}
    own = {"rate", "pattern", "seed"} | (
        {"interleave", "shuffle", "keep", "concentration"} if dropout == "paper" else set()
    )
    assert {n: given[n] for n in NAMES if n not in own} == {
        n: d for n, d in defaults(CallbackOptions).items() if n not in own
    }


DEPRECATED = {"block_size": 4, "scale": "dp", "min_features": 0, "min_multiplies": 0, "min_hidden": 0}


@pytest.mark.parametrize(("name", "value"), DEPRECATED.items())
def test_deprecated_options_warn_and_still_count(name, value):
    with pytest.warns(FutureWarning, match=f"ApproxDropout: {name} is deprecated"):
        callback = ApproxDropout(**{name: value})
    assert getattr(callback.options, name) == value


def test_unknown_options_are_named_with_those_there_are():
    with pytest.raises(TypeError, match=r"ApproxDropout has no option 'colour'; there are rate, pattern, .*seed"):
        ApproxDropout(colour="red")
    with pytest.raises(TypeError, match="approximate has no option 'resample'"):
        approximate(None, resample="step")


def test_values_out_of_range_are_misconfigurations():
    with pytest.raises(MisconfigurationException, match="ApproxDropout: resample must be .*, got 'x'"):
        ApproxDropout(resample="x")
    with pytest.raises(MisconfigurationException, match="sync_patterns must be True or False, got 1"):
        ApproxDropout(sync_patterns=1)


def test_all_but_the_rate_are_keywords():
    assert ApproxDropout(0.3).options.rate == 0.3
    with pytest.raises(TypeError):
        ApproxDropout(0.3, "row")


def test_fields_and_defaults_agree():
    assert {f.name for f in fields(Options)} == {*defaults(Options), *DEPRECATED}


def test_a_checkpoint_of_another_rule_of_orders_says_so():
    saved = {"orders": 8, "max_dp": 10}
    with pytest.warns(UserWarning, match="several orders of the units for sequences only"):
        check_same_sequence(saved, Options(orders=8))
    check_same_sequence(saved | {"group_rows": 8}, Options(orders=8, group_rows=8))
    with pytest.raises(ValueError, match="group_rows was 16, now it is 8"):
        check_same_sequence(saved | {"group_rows": 16}, Options(orders=8, group_rows=8))


def test_groups_have_fewer_rows_at_high_rates():
    options = Options(concentration=float("inf"))
    rows = {rate: options.sampler(rate, 0).group_rows for rate in (0.3, 0.5, 0.6, 0.7)}
    assert rows == {0.3: 19, 0.5: 8, 0.6: 6, 0.7: 4}
    assert Options(group_rows=6).sampler(0.7, 0).group_rows == 6
    pattern = options.sampler(0.75, 0).pattern(1024, leading_shape=(128,))  # four groups in each order
    assert (pattern.n_groups, pattern.n_orders) == (40, 10)
    shapes = {(64, 64): 8, (512,): 16, (2500,): 19, (5000,): 32}
    assert {x: options.sampler(0.5, 0).pattern(64, leading_shape=x).n_orders for x in shapes} == shapes


def test_a_checkpoint_with_fewer_orders_in_narrow_layers_says_so():
    with pytest.warns(UserWarning, match="fewer orders of the units in narrow layers"):
        check_same_sequence({"group_rows": 16}, Options(group_rows=16), rule=1)


def test_the_guide_lists_every_option_with_its_default():
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `(\w+)` \| `?([^`|]+?)`? \|", text, re.MULTILINE))
    words = {
        "rate": "the model's",
        "seed": "that of the run",
        "min_gain": "measured",
        "group_rows": "by rate",
        "orders": "by shape",
    }  # for None
    for name, value in defaults(CallbackOptions).items():
        written = words[name] if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        assert listed.get(name) in (written, written.lower()), name
