"""The summary of a sweep, from records, from a real two-job sweep and from parallel jobs."""

import csv
import json
import os
import subprocess
import sys

import pytest
from support import ROOT

from approxdrop_lightning.application.comparison import speed_up
from approxdrop_lightning.application.sweep_summary import JOB_FILE, summarise

PNG = b"\x89PNG"
RESULT = {"model": "MLPClassifier", "metric": "test/acc", "unit": "samples", "data_source": "files"}
TINY = [
    *("model.hidden=[64]", "datamodule.val_size=500", "datamodule.source=synthetic"),
    *("debug=fast", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
]


def add_job(folder, job, dropout="row", rate=0.5, seed=0, overrides=(), status="completed", **result):
    record = {"job": job, "status": status, "dropout": dropout, "rate": rate, "seed": seed}
    given = [f"dropout={dropout}", f"dropout.rate={rate}", f"seed={seed}", *overrides]
    (folder / job).mkdir()
    (folder / job / JOB_FILE).write_text(json.dumps(record | {"overrides": given} | result))


def rows(folder):
    with (folder / "summary.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def sweep(folder, *overrides):
    arguments = ["-m", f"hydra.sweep.dir={folder}", *TINY, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_lines_are_patterns_and_whatever_else_varies(tmp_path):
    same = ["debug=fast"]
    add_job(tmp_path, "0", "row", overrides=[*same, "dropout.max_dp=5"], **RESULT, test=0.9, per_second=10.0)
    add_job(tmp_path, "1", "row", overrides=[*same, "dropout.max_dp=9"], **RESULT, test=0.8, per_second=11.0)
    add_job(tmp_path, "10", "standard", overrides=same, **RESULT, test=0.7, per_second=12.0)
    add_job(tmp_path, "2", "standard", seed=1, overrides=same, **RESULT, test=0.6, per_second=None)
    summarise(tmp_path)
    assert [row["job"] for row in rows(tmp_path)] == ["0", "1", "2", "10"]
    lines = [row["line"] for row in rows(tmp_path)]
    assert lines == ["row dropout.max_dp=5", "row dropout.max_dp=9", "standard", "standard"]
    assert (tmp_path / "summary.png").read_bytes().startswith(PNG)
    assert not list(tmp_path.glob("*.tmp"))


def test_plots_both_tasks_and_rates_per_layer(tmp_path):
    add_job(tmp_path, "0", rate=[0.2, 0.4], **RESULT, test=0.9, per_second=10.0)
    text = {"model": "LSTMLanguageModel", "metric": "test/ppl", "unit": "tokens", "data_source": "synthetic"}
    add_job(tmp_path, "1", rate=0.5, **text, test=90.0, per_second=10.0)
    summarise(tmp_path)
    assert (tmp_path / "summary.png").read_bytes().startswith(PNG)
    assert [row["data_source"] for row in rows(tmp_path)] == ["files", "synthetic"]


def figure_of(monkeypatch):
    """The figures that are written, as they are."""
    figures = []
    monkeypatch.setattr(
        "approxdrop_lightning.application.sweep_plots._save", lambda figure, path: figures.append(figure)
    )
    return figures


def test_the_picture_shows_quality_and_speed_up_over_conventional_dropout_of_the_sweep(tmp_path, monkeypatch):
    speeds = {("standard", 0): 10.0, ("standard", 1): 20.0, ("row", 0): 15.0, ("row", 1): 50.0}
    for job, ((dropout, seed), speed) in enumerate(speeds.items()):
        add_job(tmp_path, str(job), dropout, seed=seed, **RESULT, test=0.95 + 0.001 * job, per_second=speed)
    figures = figure_of(monkeypatch)
    summarise(tmp_path)
    quality, speed = figures[0].axes
    assert quality.get_ylabel() == "test accuracy (%)"
    assert speed.get_ylabel() == "times as fast as conventional dropout"
    drawn = {bars.get_label(): bars for bars in speed.containers}
    assert set(drawn) == {"conventional dropout", "row pattern, interleaved"}
    points, caps, _ = drawn["row pattern, interleaved"]
    assert list(points.get_ydata()) == [2.0]  # the mean of 1.5 and 2.5, each relative to the run of its seed
    assert [cap.get_ydata()[0] for cap in caps] == [1.5, 2.5]
    # Sensible limits: speed starts at zero; accuracy spans at least two points, with a mark where the axis is cut.
    assert speed.get_ylim()[0] == 0
    assert quality.get_ylim()[1] - quality.get_ylim()[0] >= 2
    assert any(text.get_text() == "axis cut" for text in quality.texts)
    assert not speed.texts
    assert "2 seeds" in figures[0].get_suptitle()


def test_without_conventional_dropout_the_picture_shows_throughput(tmp_path, monkeypatch):
    add_job(tmp_path, "0", **RESULT, test=0.9, per_second=123.0)
    figures = figure_of(monkeypatch)
    summarise(tmp_path)
    _, speed = figures[0].axes
    assert speed.get_ylabel() == "training samples per second"
    assert list(speed.containers[0][0].get_ydata()) == [123.0]


def test_another_model_or_rate_is_no_baseline():
    row = {"model": "M", "unit": "samples", "data_source": "x", "dropout": "row", "rate": 0.5, "seed": 3} | {
        "per_second": 30.0
    }
    standard = row | {"dropout": "standard", "per_second": 10.0}
    assert speed_up(row, [row, standard]) == 3
    assert speed_up(row, [row, standard | {"seed": 1}, standard | {"seed": 2, "per_second": 20.0}]) == 2
    for other in ({"rate": 0.3}, {"model": "N"}, {"others": ["model.hidden=[64]"]}, {"data_source": "y"}):
        assert speed_up(row, [row, standard | other]) is None
    assert speed_up(row | {"others": ["dropout.max_dp=5"]}, [standard]) == 3


def test_one_epoch_has_an_axis_of_epochs(tmp_path, monkeypatch):
    add_job(tmp_path, "0", **RESULT | {"monitor": "val/acc"}, test=None)
    (tmp_path / "0" / "metrics.csv").write_text("epoch,step,val/acc\n0,9,0.9\n")
    figures = figure_of(monkeypatch)
    summarise(tmp_path)
    (axis,) = figures[0].axes
    low, high = axis.get_xlim()
    assert (low, high) == (0.5, 1.5)
    assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]
    assert axis.get_ylim()[1] - axis.get_ylim()[0] >= 2


def test_only_failed_jobs_make_a_csv_and_no_plot(tmp_path):
    add_job(tmp_path, "0", status="failed: ValueError: no")
    summarise(tmp_path)
    assert rows(tmp_path)[0]["status"] == "failed: ValueError: no"
    assert not (tmp_path / "summary.png").exists()
    assert not (tmp_path / "curves.png").exists()


def test_curves_are_means_over_seeds(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot

    def watched(self, x, y, **style):
        drawn.append((style["label"], list(x), list(y)))
        return plot(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", watched)
    for job, (seed, values) in enumerate([(0, (90, 70)), (1, (80, 60, 50))]):
        add_job(tmp_path, str(job), "row", seed=seed, **RESULT | {"monitor": "val/ppl"}, test=None)
        lines = [f"{epoch},{10 * epoch + 9},,{value}" for epoch, value in enumerate(values)]
        (tmp_path / str(job) / "metrics.csv").write_text("\n".join(["epoch,step,train/loss,val/ppl", *lines]))
    summarise(tmp_path)
    assert drawn == [("row pattern, interleaved", [1, 2, 3], [85, 65, 50])]


def test_two_job_sweep(tmp_path):
    done = sweep(tmp_path, "dropout.rate=0.3,0.5")
    assert done.returncode == 0, done.stderr
    assert "side by side: synthetic (rendered digits)" in done.stdout
    assert done.stdout.count("row pattern, interleaved") == 2
    found = rows(tmp_path)
    assert [(row["status"], row["line"], row["rate"]) for row in found] == [
        ("completed", "row", "0.3"),
        ("completed", "row", "0.5"),
    ]
    assert all(float(row["test"]) > 0 and "synthetic" in row["data_source"] for row in found)
    assert (tmp_path / "summary.png").read_bytes().startswith(PNG)
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_a_failed_job_is_named_and_the_others_stay(tmp_path):
    done = sweep(tmp_path, "dropout=standard", "dropout.rate=1.5,0.5")
    assert done.returncode != 0
    first, second = rows(tmp_path)
    assert first["status"].startswith("failed: ")
    assert "1.5 is outside [0, 1)" in first["status"]
    assert (first["job"], first["dropout"], first["rate"], first["test"]) == ("0", "standard", "1.5", "")
    assert (second["status"], second["rate"]) == ("completed", "0.5")


def test_jobs_side_by_side(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = sweep(tmp_path, "dropout=row,standard", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 0, done.stderr
    assert sorted(row["line"] for row in rows(tmp_path)) == ["row", "standard"]
    assert all(row["status"] == "completed" for row in rows(tmp_path))
