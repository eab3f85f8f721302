"""``kill -9`` of ``train.py`` on real data: a restart gives the same result as an uninterrupted run."""

import json
import os

import pytest
import torch
from support.faults import runs

pytestmark = pytest.mark.skipif("APPROXDROP_DATA" not in os.environ, reason="APPROXDROP_DATA is not set")
SHORT = ["trainer.max_epochs=2", "datamodule.train_limit=1300", "callbacks.recent.every_n_train_steps=2"]
METRICS = {
    "mlp": ("train/loss", "val/loss", "val/acc", "test/acc", "test/loss", "dropout/realised_rate"),
    "lstm": ("train/loss", "train/ppl", "val/loss", "val/ppl", "test/ppl", "dropout/realised_rate"),
}


def uninterrupted(tmp_path, model, *overrides):
    """Steps of an uninterrupted run, and its folder."""
    whole, trace = tmp_path / "whole", tmp_path / "whole.jsonl"
    runs.here(model, whole / "run", trace, *overrides)
    return {line["step"]: (line["patterns"], line["loss"]) for line in runs.lines(trace)}, whole


def survive(parts, model, kills, rng, *overrides):
    """Kill a run up to so many times, restart it each time, until one is done.

    Returns:
        Number of kills, how many of them were within writing a checkpoint, and the folder of the run that was done.
    """
    trace, killed, died_writing, resume = parts / "trace.jsonl", 0, 0, []
    parts.mkdir()
    while True:
        folder = parts / f"{killed:03d}"
        if killed == kills:
            runs.here(model, folder, trace, *overrides, *resume)
            return killed, died_writing, folder
        process = runs.start(model, folder, trace, *overrides, *resume)
        status, output, writing = runs.kill(process, trace, folder, rng, within_write=killed % 2 == 0)
        if status == 0:
            return killed, died_writing, folder
        assert status == -9, output
        killed, died_writing = killed + 1, died_writing + writing
        for path in parts.rglob("*.ckpt"):
            runs.checkpoint(path)  # files under the final name are intact
            resume = ["ckpt_path=last"]
        print(f"kill {killed} after {len(runs.lines(trace))} steps{', within writing' if writing else ''}")


def compare(model, expected, whole, parts, last):
    steps = runs.lines(parts / "trace.jsonl")
    for line in steps:
        assert (line["patterns"], line["loss"]) == expected[line["step"]], line
    assert {line["step"] for line in steps} == set(expected)
    a, b = (runs.checkpoint(path / "checkpoints" / "last.ckpt") for path in (whole / "run", last))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    first, second = (json.loads((path / "result.json").read_text()) for path in (whole / "run", last))
    for key in ("best_validation", "test", "realised_rate", "epochs"):
        assert first[key] == second[key], key
    # Of a step that was made twice, the later value is taken. What the logger had not written when its process was
    # killed is lost with it, but nothing that was written may differ.
    a, b = (runs.metrics(path, METRICS[model]) for path in (whole, parts))
    assert {column for column, _ in b} == set(METRICS[model])
    assert {key: value for key, value in b.items() if a[key] != value} == {}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "lstm"])
def test_ten_kills(tmp_path, model):
    expected, whole = uninterrupted(tmp_path, model)
    rng, killed, died_writing, number = runs.rng(model), 0, 0, 0
    while killed < 10:
        parts, number = tmp_path / f"parts{number}", number + 1
        more, writing, last = survive(parts, model, 10 - killed, rng)
        compare(model, expected, whole, parts, last)
        killed, died_writing = killed + more, died_writing + writing
    print(f"{model}: {killed} kills in {number} runs, {died_writing} of them within writing a checkpoint")
    assert died_writing > 0


def test_one_kill_within_writing(tmp_path):
    expected, whole = uninterrupted(tmp_path, "mlp", *SHORT)
    killed, died_writing, last = survive(tmp_path / "parts", "mlp", 1, runs.rng(0), *SHORT)
    assert (killed, died_writing) == (1, 1)
    compare("mlp", expected, whole, tmp_path / "parts", last)
