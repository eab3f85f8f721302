"""The benchmark runs, verifies before timing, and records its environment; the times are not tested."""

import csv

import pytest
import torch
from support.compiled import rewriting
from torch._dynamo.utils import counters

from approxdrop_lightning.benchmark import contenders, measure, workloads
from approxdrop_lightning.benchmark.__main__ import COLUMNS, main
from approxdrop_lightning.graph import packed
from approxdrop_lightning.graph.counts import COUNTS
from approxdrop_lightning.ops.row_linear import groups
from approxdrop_lightning.ops.tile_linear import compact as tiles


@pytest.fixture(autouse=True)
def _settings_of_the_process():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_default_device(None)


SMALL = ["--repeats", "2", "--malloc", "default", "--rate", "0.3", "0.5"]
MLP = ["mlp", "--hidden", "96", "96", "--batch", "24", "--min-gain", "0", *SMALL]


def test_one_table_with_every_contender_and_a_csv_that_grows(tmp_path, capsys):
    path, plot = tmp_path / "new" / "b.csv", tmp_path / "b.png"
    patterns = ["row", "shared", "paper", "tile", "dropconnect"]
    arguments = [*MLP, "--csv", str(path), "--pattern", *patterns]
    rows = main([*arguments, "--baseline", "none", "narrow", "sliced", "sliceout", "--plot", str(plot)])
    names = ["conventional", "none", "narrow", "sliced", "sliceout", *patterns]
    assert [row["contender"] for row in rows] == names * 2
    by_name = {(row["contender"], row["rate"]): row for row in rows}
    assert by_name["conventional", 0.5]["to_conventional"] == 1
    # 784-96-96-10 at .5, mostly (dp, keep) = (2, 1): halves of the outer products, a quarter of the middle one
    assert by_name["row", 0.5]["ceiling"] == pytest.approx(2.1, abs=0.1)
    # the ten outputs are too few for tiles, and nothing is dropped of the first layer's weight
    assert by_name["tile", 0.5]["ceiling"] == pytest.approx(1 / (1 - 0.5 * (96 + 10) / (784 + 96 + 10)))
    assert by_name["dropconnect", 0.5]["ceiling"] == 1
    assert all(row["peak_mb"] > 0 and row["first_quartile_ms"] <= row["median_ms"] for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "MLP 784-96-96-10, batch 24" in output
    main(arguments)  # with the baselines that are always there: conventional, none, narrow
    with path.open() as file:
        recorded = list(csv.DictReader(file))
    assert set(recorded[0]) == {*COLUMNS, "device", "threads", "torch", "python", "commit", "time"}
    assert len(recorded) == 2 * len(names) + 2 * (3 + len(patterns))


def test_each_number_of_orders_is_a_contender(monkeypatch):
    made = {}
    make = contenders.contender

    def contender(workload, name, *args, **options):
        step = make(workload, name, *args, **options)
        made.setdefault((options.get("orders"), options.get("group_rows")), step)
        return step

    monkeypatch.setattr(contenders, "contender", contender)
    arguments = [*MLP[:-2], "0.5", "--pattern", "row", "--baseline", "--orders", "4", "--group-rows", "12", "3"]
    rows = main(arguments)
    assert [row["contender"] for row in rows] == ["conventional", "row, group_rows 12", "row, group_rows 3"]
    orders = {
        key: {site.last_patterns[0].n_orders for site in step.report.sites} for key, step in made.items() if key[0]
    }
    assert orders == {(4, 12): {1}, (4, 3): {4}}  # 24 rows in two groups for each order


def test_lstm_and_profile(capsys):
    arguments = ["lstm", "--hidden", "64", "--steps", "5", "--batch", "4", "--vocabulary", "50", "--min-gain", "0"]
    rows = main([*arguments, *SMALL, "--profile", "--recurrent"])
    assert {row["contender"] for row in rows} == {"conventional", "none", "narrow", "row", "shared"}
    assert "aten::mm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "name", "saved"),
    [
        # Feed-forward blocks between two dropouts, and the decoder; nothing is saved in attention.
        (
            ["transformer", "--hidden", "64", "--layers", "1", "--steps", "8", "--batch", "6", "--vocabulary", "50"],
            "transformer 1x64, T=8, B=6, vocabulary 50",
            (0.3, 0.5),
        ),
        (["sign", "--hidden", "64", "--batch", "24"], "SIGN 4x(128-64), batch 24", (0.6, 0.7)),
        (["ctr", "--hidden", "96", "64", "--batch", "24"], "CTR 24x16-96-64-2, batch 24", (0.5, 0.6)),
        # The second layer is all that has a dropout before it and, behind its batch norm, none that it sees.
        (
            ["ctr", "--hidden", "96", "64", "--batch", "24", "--batch-norm"],
            "CTR 24x16-96-64-2, batch norm, batch 24",
            (0.05, 0.1),
        ),
    ],
)
def test_workloads_of_today(arguments, name, saved, tmp_path):
    path = tmp_path / "b.csv"
    unbounded = ["--min-gain", "0", "--csv", str(path)]
    rows = main([*arguments, *SMALL[:-2], "0.5", *unbounded, "--pattern", "row", "shared", "tile"])
    assert [row["contender"] for row in rows] == ["conventional", "none", "narrow", "row", "shared", "tile"]
    assert {row["workload"] for row in rows} == {name}
    by_name = {row["contender"]: row for row in rows}
    low, high = saved
    assert low < 1 - 1 / by_name["row"]["ceiling"] < high
    assert by_name["shared"]["ceiling"] == pytest.approx(by_name["row"]["ceiling"], rel=0.02)
    assert sum(1 for _ in path.open()) == 1 + len(rows)


@pytest.fixture
def compiled(monkeypatch):
    """``torch.compile`` by a backend that generates no code, which takes long; the pass rewrites all the same."""

    def compile(model, backend="inductor", original=torch.compile):
        return original(model, backend=rewriting if backend == "inductor" else backend)

    torch.compiler.reset()
    counters.clear()
    COUNTS.clear()
    monkeypatch.setattr(torch, "compile", compile)


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_compiled_contenders_beside_eager_ones(kind, compiled, monkeypatch):
    sizes = {
        "mlp": ["--hidden", "96", "96", "--batch", "24"],
        "transformer": ["--hidden", "64", "--layers", "1", "--steps", "8", "--batch", "6", "--vocabulary", "50"],
    }
    late = []
    timed = measure.interleaved

    def watched(steps, *args, **kwargs):
        before = counters["stats"]["unique_graphs"]
        seconds = timed(steps, *args, **kwargs)
        late.append(counters["stats"]["unique_graphs"] - before)
        return seconds

    monkeypatch.setattr(measure, "interleaved", watched)
    arguments = [kind, *sizes[kind], *SMALL[:-2], "0.5", "--min-gain", "0"]
    rows = main([*arguments, "--compile", "--pattern", "row", "tile", "--baseline", "none"])
    names = ["conventional", "none", "compiled", "row", "row, compiled", "tile"]
    assert [row["contender"] for row in rows] == names
    by_name = {row["contender"]: row for row in rows}
    assert by_name["compiled"]["to_compiled"] == 1
    if kind == "mlp":
        assert by_name["row, compiled"]["ceiling"] == pytest.approx(by_name["row"]["ceiling"], rel=0.02)
    assert COUNTS.producers > COUNTS.graphs > 0
    assert late == [0]  # what is timed compiles nothing


def test_wrong_compiled_products_are_not_timed(monkeypatch):
    torch.compiler.reset()
    step = contenders.contender(workloads.mlp([784, 96, 10], 24), "row", 0.5)
    contenders.verify_compiled(step, 0.5)
    torch.compiler.reset()
    right = packed.linear
    monkeypatch.setattr(packed, "linear", lambda *a: right(*a) * 1.01)
    with pytest.raises(AssertionError):
        contenders.verify_compiled(step, 0.5)


def test_ops():
    patterns = ["--pattern", "row", "tile", "dropconnect"]
    rows = main(["ops", "--hidden", "64", "--batch", "16", *SMALL, *patterns])
    assert {
        "linear 64x64, batch 16, in and out",
        "linear 64x64, batch 16, weight",
        "what the callback does per step, ten sites",
    } <= {row["workload"] for row in rows}


@pytest.mark.parametrize(
    ("name", "place", "layer"),
    [
        ("row", (groups.GroupedLinear, "gradients"), "0.weight"),
        ("shared", (groups.GroupedLinear, "gradients"), "0.weight"),
        ("paper", (groups.GroupedLinear, "gradients"), "0.weight"),
        ("tile", (tiles, "_weight_grad"), "3.weight"),
    ],
)
def test_a_wrong_gradient_is_not_timed(name, place, layer, monkeypatch):
    torch.manual_seed(0)
    step = contenders.contender(workloads.mlp([784, 96, 10], 24), name, 0.5, min_gain=0)
    contenders.verify(step, 0.5, min_gain=0)
    right = getattr(*place)

    def wrong(*args):
        found = right(*args)
        if isinstance(found, torch.Tensor):
            return found * 1.01
        of_input, of_weight, of_bias = found
        return of_input, of_weight * 1.01, of_bias

    monkeypatch.setattr(*place, wrong)
    with pytest.raises(AssertionError, match=rf"the gradient of {layer} is off by 1.0%"):
        contenders.verify(step, 0.5, min_gain=0)


def test_peak_memory_is_what_a_step_holds_at_once():
    def step():
        a = torch.ones(2**20)
        b = a + 1
        del a
        return b + 1

    assert measure.peak_memory(step) == pytest.approx(8, abs=0.1)


def test_rounds_take_turns():
    order = []
    steps = {name: lambda n=name: order.append(n) for name in "ab"}
    seconds = measure.interleaved(steps, repeats=3, warmup=1, consecutive=2)
    assert order == list("aaabbb" * 4)  # the first one of each round is not timed
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert measure.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0
