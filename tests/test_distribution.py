"""Distribution search: exact where it claims to be, with a warning where it is not."""

import itertools
import math
import re
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from approxdrop_lightning import PatternDistribution
from approxdrop_lightning.distribution.__main__ import main
from approxdrop_lightning.distribution.picture import arrangements
from approxdrop_lightning.options import Options

rates = st.floats(0, 0.93)
gammas = st.one_of(st.floats(0, 1e5), st.just(math.inf))


@given(rate=rates, max_dp=st.integers(1, 24), gamma=gammas, keep=st.sampled_from(["one", "any"]))
@settings(max_examples=300, deadline=None)
def test_any_rate_is_met_or_refused_with_the_max_dp_that_serves(rate, max_dp, gamma, keep):
    if rate > (max_dp - 1) / max_dp:
        with pytest.raises(ValueError, match="smallest max_dp that serves is (?P<n>[0-9]+)") as error:
            PatternDistribution.search(rate, max_dp, keep=keep, concentration=gamma)
        serves = int(str(error.value).rsplit(" ", 1)[1])
        PatternDistribution.search(rate, serves, keep=keep, concentration=gamma)
        assert rate > (serves - 2) / (serves - 1) - 1e-9  # one less would not have served
        return
    found = PatternDistribution.search(rate, max_dp, keep=keep, concentration=gamma)
    assert abs(found.expected_rate - rate) < 1e-9
    assert abs(sum(found.probabilities) - 1) < 1e-12
    assert min(found.probabilities) >= 0


def test_support_of_keep_one_is_every_period():
    found = PatternDistribution.search(0.5, 7)
    assert found.support == tuple((dp, 1) for dp in range(1, 8))


@pytest.mark.parametrize("keep", ["one", "any"])
def test_rate_zero_never_drops(keep):
    found = PatternDistribution.search(0.0, 10, keep=keep)
    assert {pair: k for pair, k in zip(found.support, found.probabilities, strict=True) if k} == {(1, 1): 1.0}


def test_maximum_entropy_beats_every_feasible_neighbour():
    """Moving along a direction that keeps sum and rate must lower the entropy (first and second order)."""
    found = PatternDistribution.search(0.6, 6)
    k = list(found.probabilities)
    u = [(dp - 1) / dp for dp, _ in found.support]
    entropy = found.entropy
    for i, j, m in [(0, 2, 5), (1, 3, 4), (0, 1, 2), (2, 3, 5)]:
        # a_i + a_j + a_m = 0 and a_i u_i + a_j u_j + a_m u_m = 0
        direction = {i: u[j] - u[m], j: u[m] - u[i], m: u[i] - u[j]}
        for step in (1e-3, -1e-3):
            moved = [k[x] + step * direction.get(x, 0) for x in range(6)]
            assert -sum(x * math.log(x) for x in moved) < entropy


def test_concentration_makes_the_step_steadier_down_to_the_bracket():
    spreads = [PatternDistribution.search(0.7, 10, concentration=g).rate_std for g in (0, 1, 10, 100, 1e4, math.inf)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(spreads))
    assert spreads[0] > 2 * spreads[-1]
    bracket = PatternDistribution.search(0.7, 10, concentration=math.inf)
    used = {pair for pair, k in zip(bracket.support, bracket.probabilities, strict=True) if k}
    assert used == {(3, 1), (4, 1)}


def test_table_of_the_method_note():
    """Second moments of the maximum-entropy distribution, N = 8 and 16 (computed by hand elsewhere)."""
    for max_dp, rate, none, spread in ((8, 0.5, 0.31, 0.356), (16, 0.5, 0.37, 0.401), (16, 0.7, 0.15, 0.318)):
        found = PatternDistribution.search(rate, max_dp)
        assert found.probabilities[0] == pytest.approx(none, abs=0.005)
        assert found.rate_std == pytest.approx(spread, abs=0.0005)


def test_keep_any_meets_rates_below_half_without_idle_steps():
    found = PatternDistribution.search(0.3, 10, keep="any", concentration=1000.0)
    idle = dict(zip(found.support, found.probabilities, strict=True))[(1, 1)]
    assert idle < 1e-6
    assert found.rate_std < 0.05
    one = PatternDistribution.search(0.3, 10, keep="one", concentration=1000.0)
    assert one.probabilities[0] == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.85])
@pytest.mark.parametrize("max_dp", [10, 16])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_papers_search_converges_to_the_closed_form(rate, max_dp, gamma):
    exact = PatternDistribution.search(rate, max_dp, concentration=gamma)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = PatternDistribution.search(rate, max_dp, method="sgd", concentration=gamma)
    assert abs(found.expected_rate - rate) <= 1e-3
    assert abs(found.entropy - exact.entropy) <= 1e-2


def test_the_papers_search_says_so_when_it_does_not_converge():
    with pytest.warns(UserWarning, match="did not converge for rate 0.1"):
        PatternDistribution.search(0.1, 10, method="sgd", concentration=1000.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.0}, r"\[0, 1\), got 1.0"),
        ({"rate": -0.1}, r"\[0, 1\), got -0.1"),
        ({"rate": math.nan}, r"\[0, 1\), got nan"),
        ({"rate": "half"}, r"\[0, 1\), got 'half'"),
        ({"rate": 0.5, "max_dp": 0}, "max_dp must be an integer >= 1, got 0"),
        ({"rate": 0.5, "max_dp": 2.5}, "max_dp must be an integer >= 1, got 2.5"),
        ({"rate": 0.5, "method": "magic"}, "'maxent' or 'sgd', got 'magic'"),
        ({"rate": 0.5, "keep": "two"}, "'one' or 'any', got 'two'"),
        ({"rate": 0.5, "concentration": -1}, "concentration must be a number >= 0, got -1"),
        ({"rate": 0.95, "max_dp": 10}, "smallest max_dp that serves is 20"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatternDistribution.search(**arguments)


def test_command_prints_what_was_searched(capsys):
    main(["0.7"])
    text = capsys.readouterr().out
    found = PatternDistribution.search(0.7, Options.max_dp, keep=Options.keep, concentration=Options.concentration)
    for (dp, keep), probability in zip(found.support, found.probabilities, strict=True):
        line = re.search(rf"^ *{dp} +{keep} +{1 - keep / dp:.3f} +{probability:.3f}  (#*)$", text, re.MULTILINE)
        assert (line is not None) == (probability >= 0.001)
        assert line is None or len(line[1]) == max(1, round(40 * probability))
    assert f"{found.rate_std:.3f}" in text and f"{found.entropy:.2f}" in text


def test_command_has_a_line_for_each_combination(capsys):
    main(["0.3", "0.5", "--keep", "one", "any", "--concentration", "0", "inf"])
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r" +0\.", line)]
    assert len(lines) == 8
    assert "58.4%" in lines[0]  # of the steps of the paper's distribution drop nothing at .3
    assert "0.0%" in lines[3]


def test_command_refuses_what_the_search_refuses(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["0.95"])
    assert "the smallest max_dp that serves is 20" in capsys.readouterr().err


def test_command_runs_as_a_module_without_a_warning():
    command = [sys.executable, "-W", "error", "-m", "approxdrop_lightning.distribution", "0.5"]
    assert "0.500" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_picture_shows_what_the_patterns_keep():
    conventional, shared, interleaved = arrangements(2, 1)
    assert (shared.kept == shared.kept[0]).all()
    assert not (interleaved.kept[0] * interleaved.kept[1]).any()  # neighbours keep different units
    assert [part.multiplies for part in (conventional, shared, interleaved)] == [1, 0.25, 0.25]
    assert (shared.read != 0).float().mean() == 0.25
    assert [(interleaved.read == group).float().mean() for group in (1, 2)] == [0.25, 0.25]
    # A group reads the columns that its rows keep, and no others.
    for group in (1, 2):
        columns = (interleaved.kept == group).any(0)
        assert not ((interleaved.read == group).any(0) & ~columns).any()
    assert (arrangements(10, 7)[2].read == -1).any()  # below .5 groups share weights


def test_the_command_draws(tmp_path, capsys):
    main(["0.5", "--plot", str(tmp_path / "idea.png")])
    assert (tmp_path / "idea.png").read_bytes().startswith(b"\x89PNG")
    assert "probability" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["0.3", "0.5", "--plot", "x.png"], "--plot draws one distribution, got 2"),
        (["0.5", "--plot", "/nowhere/x.png"], "No such file or directory"),
        (["0.5", "--plot", "x.jpeg2"], "jpeg2"),
    ],
)
def test_the_command_says_what_it_cannot_draw(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="2"):
        main(["0.5", "--plot", str(tmp_path / "x.png")])
    assert "pip install 'approxdrop-lightning[train]'" in capsys.readouterr().err
