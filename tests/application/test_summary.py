"""The summary of a sweep, from records, from a real two-job sweep and from jobs that ran side by side."""

import csv
import json
import os
import subprocess
import sys

import pytest
from support import ROOT

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


def test_only_failed_jobs_make_a_csv_and_no_plot(tmp_path):
    add_job(tmp_path, "0", status="failed: ValueError: no")
    summarise(tmp_path)
    assert rows(tmp_path)[0]["status"] == "failed: ValueError: no"
    assert not (tmp_path / "summary.png").exists()
    assert not (tmp_path / "curves.png").exists()


def test_curves_are_means_over_seeds(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **style: drawn.append((style["label"], list(x), list(y))))
    for job, (seed, values) in enumerate([(0, (90, 70)), (1, (80, 60, 50))]):
        add_job(tmp_path, str(job), "row", seed=seed, **RESULT | {"monitor": "val/ppl"}, test=None)
        lines = [f"{epoch},{10 * epoch + 9},,{value}" for epoch, value in enumerate(values)]
        (tmp_path / str(job) / "metrics.csv").write_text("\n".join(["epoch,step,train/loss,val/ppl", *lines]))
    summarise(tmp_path)
    assert drawn == [("row", [1, 2, 3], [85, 65, 50])]


def test_two_job_sweep(tmp_path):
    done = sweep(tmp_path, "dropout.rate=0.3,0.5")
    assert done.returncode == 0, done.stderr
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
