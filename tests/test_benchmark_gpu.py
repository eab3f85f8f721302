"""``benchmark gpu`` from start to end, without a GPU; the results are not tested."""

import csv

import pytest
import torch

from approxdrop_lightning.benchmark import gpu
from approxdrop_lightning.benchmark.__main__ import main
from approxdrop_lightning.benchmark.gpu import correctness, products, steps
from approxdrop_lightning.ops.pack import pack_ops

pytest.importorskip("triton")


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_all_parts(tmp_path, capsys, monkeypatch):
    workloads = steps._workloads("cpu")[:1]  # the command trains more
    monkeypatch.setattr(steps, "_workloads", lambda device: workloads)
    for part in (correctness, products, steps):
        monkeypatch.setattr(part, "RATES", (0.5, 0.3))
    rows = main(["gpu", "--device", "cpu", "--minutes", "5", "--output", str(tmp_path / "new")])
    by_part = {name: [row for row in rows if row["part"] == name] for name, *_ in gpu.PARTS}
    correct = by_part["correctness"]
    assert len(correct) == 10
    assert [row for row in correct if not row.get("ok") and row.get("note") != "only with a GPU"] == []
    assert {row["rate"] for row in by_part["products"]} == {0.3, 0.5}
    assert all(row["bmm_both_sides_ms"] > 0 and row["ideal"] > 2 for row in by_part["products"])
    assert {row["what"] for row in by_part["copies"]} == {"weight", "activations"}
    assert all(row["pack_gb_s"] > 0 and row["unpack_gb_s"] > 0 for row in by_part["copies"])
    found = {(row["workload"], row["contender"], row["mode"]): row for row in by_part["steps"] if row["rate"] == 0.5}
    mlp = "MLP 20-64-64-10, batch 32"
    assert found[mlp, "conventional", "compiled"]["to_same_mode"] == 1
    assert found[mlp, "row", "graphed"]["note"] == "only with a GPU"
    assert found[mlp, "row", "eager"]["host_ms"] > 0
    assert found[mlp, "row", "eager"]["ceiling"] > 2  # it skips
    assert [row for row in rows if "error" in row] == []
    for name, title, *_ in gpu.PARTS:
        recorded = read(tmp_path / "new" / f"{name}.csv")
        assert len(recorded) == len(by_part[name])
        assert recorded[0]["torch"] == torch.__version__
        assert f"## {title}\n\n| " in (tmp_path / "new" / "gpu.md").read_text()
    assert "## 1. Correctness" in capsys.readouterr().out


def test_a_case_that_fails_is_a_row_and_not_the_end(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(correctness, "_check_tiles", fail)
    rows = gpu.main(["--device", "cpu", "--part", "correctness", "--output", str(tmp_path)])
    errors = {row["what"]: row["error"] for row in rows if "error" in row}
    assert errors == {"tiles 300x420": "RuntimeError: no such instruction"}
    assert len(rows) == 12
    assert "no such instruction" in capsys.readouterr().err  # with its trace


def test_wrong_numbers_are_seen(tmp_path, monkeypatch):
    right = pack_ops.unpack
    monkeypatch.setattr(pack_ops, "unpack", lambda *a: right(*a) * 1.01)
    rows = gpu.main(["--device", "cpu", "--part", "correctness", "--output", str(tmp_path)])
    assert [row["ok"] for row in rows if row["what"].startswith("pack and unpack")][:4] == [False] * 4


def test_what_there_is_no_time_for_is_said(tmp_path):
    rows = gpu.main(["--device", "cpu", "--minutes", "0", "--output", str(tmp_path)])
    assert len(rows) == len(gpu.PARTS)
    assert rows[0]["error"] == "not run, nor the 11 after it: the time is over"
    assert read(tmp_path / "steps.csv")[0]["error"].startswith("not run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path)])
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err
