"""Time to quality, from records of runs and from a real sweep."""

import json

import pytest

from approxdrop_lightning.application.time_to_quality import main


def add_run(folder, name, dropout, seed, values, seconds_per_step=1.0, metric="test/ppl", rate=0.5):
    monitor = "val/" + metric.split("/")[1]
    (folder / name / "csv").mkdir(parents=True)
    record = {"model": "M", "dropout": dropout, "rate": rate, "seed": seed, "metric": metric, "monitor": monitor}
    (folder / name / "result.json").write_text(json.dumps(record | {"seconds_per_step": seconds_per_step}))
    lines = [f"epoch,step,train/loss,{monitor}"]
    for epoch, value in enumerate(values):
        lines += [f"{epoch},{10 * epoch + 4},0.1,", f"{epoch},{10 * epoch + 9},,{value}"]
    (folder / name / "csv" / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_seeds_are_compared_with_their_own_baseline(tmp_path):
    add_run(tmp_path, "0", "standard", 0, [90, 70, 60])  # 60 after 3 epochs, 30 steps
    add_run(tmp_path, "1", "standard", 1, [90, 50, 55])  # 50 after 2
    add_run(tmp_path, "2", "row", 0, [80, 59, 61], 0.5)  # in 2 epochs, at twice the speed: a third of the time
    add_run(tmp_path, "3", "row", 1, [70, 60, 51], 0.5)  # never
    assert main([str(tmp_path)]) == [
        ("M", "0.5", "row", "1 of 2", "2.0", "10.0", "0.33"),
        ("M", "0.5", "standard", "2 of 2", "2.5", "25.0", "1.00"),
    ]


def test_almost_as_good_is_asked_of_the_baseline_too(tmp_path, capsys):
    add_run(tmp_path, "0", "standard", 0, [90, 60.5, 60])
    add_run(tmp_path, "1", "row", 0, [80, 70, 60.6], 0.5)
    assert main([str(tmp_path), "--within", "1"]) == [
        ("M", "0.5", "row", "1 of 1", "3.0", "15.0", "0.75"),
        ("M", "0.5", "standard", "1 of 1", "2.0", "20.0", "1.00"),
    ]
    assert [row[3] for row in main([str(tmp_path), "--within", "0.9"])] == ["0 of 1", "1 of 1"]
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--within", "100"])
    assert "[0, 100), got 100" in capsys.readouterr().err


def test_accuracy_is_better_the_higher_it_is(tmp_path, capsys):
    add_run(tmp_path, "0", "standard", 0, [0.5, 0.9], metric="test/acc")
    add_run(tmp_path, "1", "row", 0, [0.91, 0.2], metric="test/acc")
    add_run(tmp_path, "2", "row", 0, [0.1, 0.2], metric="test/acc", rate=0.7)  # has no baseline
    assert [row[2:] for row in main([str(tmp_path)])] == [
        ("row", "1 of 1", "1.0", "10.0", "0.50"),
        ("standard", "1 of 1", "2.0", "20.0", "1.00"),
    ]
    assert "times the baseline's" in capsys.readouterr().out


def test_without_a_baseline_it_says_so(tmp_path, capsys):
    add_run(tmp_path, "0", "row", 0, [1.0])
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--baseline", "none"])
    assert "no finished run with dropout=none" in capsys.readouterr().err
