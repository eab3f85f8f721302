"""``train.py`` end to end: models, slices of real data and synthetic data, resume, Ctrl-C, bad input."""

import csv
import json
import os
import signal
import subprocess
import time
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from hydra.errors import ConfigCompositionException, InstantiationException
from lightning import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import ROOT
from support.compiled import rewriting
from support.runs_of_train import QUICK, SMALL, command, config, last_weights, weights
from support.skipping import assert_skips
from torch._dynamo.utils import counters

from approxdrop_lightning.application.models import MLPClassifier
from approxdrop_lightning.graph.counts import COUNTS
from train import compare, find_checkpoint, train

FILES = pytest.param(
    "files",
    marks=pytest.mark.skipif("APPROXDROP_DATA" not in os.environ, reason="APPROXDROP_DATA is not set"),
)
SYNTHETIC = "datamodule.source=synthetic"


@pytest.mark.parametrize("dropout", ["row", "standard", "tile"])
@pytest.mark.parametrize("source", [FILES, "synthetic"])
@pytest.mark.parametrize("model", ["mlp", "lstm"])
def test_end_to_end(tmp_path, model, source, dropout):
    overrides = [*SMALL[model], *QUICK, f"dropout={dropout}", f"datamodule.source={source}"]
    skip = [] if dropout == "standard" else ["dropout.min_gain=0"]
    metrics, objects = train(config(tmp_path, *overrides, *skip))
    if skip:
        assert_skips(objects["callbacks"]["dropout"].report, everywhere=dropout == "row")

    unit = {"mlp": "samples", "lstm": "tokens"}[model]
    for name in ("train/loss", "val/loss", f"throughput/{unit}_per_sec"):
        assert metrics[name] > 0, name
    if model == "mlp":
        assert 0 < metrics["test/acc"] < 1
    else:
        assert metrics["test/ppl"] < 300  # the perplexity of guessing
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == objects["result"]
    assert result["per_second"] > 0 and result["seconds_per_step"] > 0
    assert result["realised_rate"] == ("nominal" if dropout == "standard" else pytest.approx(0.5, abs=0.02))
    assert source in result["data_source"]
    assert (result["best_perplexity"] is not None) == (model == "lstm" and source == "synthetic")
    assert Path(result["best_checkpoint"]).is_file()
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert result["steps"] == 20
    check_hparams(tmp_path / "tensorboard", result)
    assert result["data_source"] in (tmp_path / "csv" / "hparams.yaml").read_text()
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open()))
    for name in ("train/loss", "val/loss", result["metric"], f"throughput/{unit}_per_sec"):
        assert any(row[name] for row in rows), name


def check_hparams(folder, result):
    """What TensorBoard's HPARAMS tab reads: parameters of the session, and metrics by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(folder)).Reload()
    parsed = {}
    for tag, content in events.PluginTagToContent("hparams").items():
        parsed[tag] = HParamsPluginData.FromString(content)
    (start,) = (data.session_start_info.hparams for data in parsed.values() if data.HasField("session_start_info"))
    assert start["dropout/name"].string_value == result["dropout"]
    assert start["data_source"].string_value == result["data_source"]
    assert "model/rate" in start and "trainer/max_epochs" in start
    measured = events.Scalars("result/" + result["metric"].replace("/", "_"))
    assert [event.value for event in measured] == [pytest.approx(result["test"])]


def test_a_first_run_follows_the_data_that_it_finds(tmp_path):
    """More epochs and larger steps on the embedded data; overrides on the command line take precedence."""
    cfg = config(tmp_path, "datamodule.source=embedded", *QUICK, *SMALL["mlp"], "test=false")
    cfg.trainer.max_epochs = config("x").trainer._get_node("max_epochs")._value()  # as without debug=fast
    cfg.trainer.limit_train_batches = 1
    _, objects = train(cfg)
    assert objects["result"]["epochs"] == 20
    assert objects["trainer"].optimizers[0].defaults["lr"] == 0.05
    assert objects["model"].hparams.schedule == "cosine"
    assert config("x").trainer.max_epochs == 5
    assert config("x", "data_kind=embedded", "trainer.max_epochs=3", "model.optimizer.lr=1").trainer.max_epochs == 3
    assert config("x", "data_kind=embedded", "experiment=mnist_1024").model.optimizer.lr == 0.01


def test_compare_trains_conventional_dropout_too(tmp_path):
    arguments = [*SMALL["mlp"], *QUICK, "compare=true", "datamodule.source=embedded", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "side by side: MNIST, a part (5,000 images, embedded)" in done.stdout
    row, baseline = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("", "standard"))
    assert (row["dropout"], baseline["dropout"]) == ("row", "standard")
    assert row["rate"] == baseline["rate"] == 0.5
    gain = row["per_second"] / baseline["per_second"]
    lines = [line for line in done.stdout.splitlines() if "row pattern, interleaved" in line]
    assert len(lines) == 1 and f"{gain:.2f}" in lines[0]
    log = next(tmp_path.glob("*.log")).read_text()
    assert "data source: MNIST, a part (5,000 images, embedded)" in log
    assert f"test_acc {row['test']:.6g}" in log


@pytest.fixture
def compiled(monkeypatch):
    """``compile=true`` by a backend that generates no code, which takes long; the pass rewrites all the same."""
    torch.compiler.reset()
    counters.clear()
    COUNTS.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=rewriting))
    yield
    torch.compiler.reset()


def test_compiled(tmp_path, compiled):
    """Graphs skip; keys, evaluation and resumes are as without: a run goes on from whatever has saved it."""
    overrides = [*SMALL["mlp"], *QUICK, SYNTHETIC, "dropout.min_gain=0", "compile=true"]
    metrics, straight = train(config(tmp_path / "straight", *overrides, "trainer.max_epochs=2"))
    assert COUNTS.producers == 2 * COUNTS.graphs > 0 and COUNTS.consumers == 2 * COUNTS.graphs
    assert not counters["graph_break"]
    assert [row.consumers for row in straight["callbacks"]["dropout"].report] == [("net.4",), ("net.7",)]
    assert straight["result"]["compiled"] and straight["result"]["per_second"] > 0
    keys = set(torch.load(straight["result"]["best_checkpoint"], weights_only=True)["state_dict"])
    assert keys == {f"net.{i}.{name}" for i in (1, 4, 7) for name in ("weight", "bias")}
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, limit_test_batches=5)
    # Into a model that is not compiled.
    best = MLPClassifier.load_from_checkpoint(straight["result"]["best_checkpoint"])
    assert trainer.test(best, straight["datamodule"])[0]["test/acc"] == metrics["test/acc"]

    train(config(tmp_path / "half", *overrides, "test=false"))
    resume = ["trainer.max_epochs=2", "test=false", f"ckpt_path={tmp_path / 'half'}"]
    _, resumed = train(config(tmp_path / "resumed", *overrides, *resume))
    assert resumed["trainer"].current_epoch == 2
    assert resumed["result"]["realised_rate"] == straight["result"]["realised_rate"]  # the same pairs, step by step
    _, eager = train(config(tmp_path / "eager", *overrides, *resume, "compile=false"))
    assert eager["trainer"].current_epoch == 2 and not eager["result"]["compiled"]
    assert set(weights(eager)) == keys


def test_a_comparison_compiles_both(tmp_path, compiled):
    overrides = [*SMALL["mlp"], *QUICK, SYNTHETIC, "dropout.min_gain=0", "compile=true", "test=false"]
    _, objects = compare(config(tmp_path, *overrides))
    assert objects["baseline"]["compiled"] and objects["result"]["compiled"]
    assert objects["baseline"]["dropout"] == "standard"
    # Two modes of each (training and validation), and of the other at most four pairs.
    assert 2 * 2 <= counters["stats"]["unique_graphs"] <= 2 + 1 + 4
    assert COUNTS.producers == 2 * COUNTS.graphs > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dropout=standard", "dropout=standard skips nothing"),
        ("dropout=none", "dropout=none skips nothing"),
        ("ckpt_path=last", "from the beginning, got ckpt_path=last"),
    ],
)
def test_compare_says_what_cannot_be_compared(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        compare(config(tmp_path, "compare=true", override))


@pytest.mark.parametrize("model", ["mlp", "lstm"])
def test_it_learns(tmp_path, model):
    """A few hundred steps on synthetic data, dropout=row."""
    if model == "mlp":
        overrides = ["trainer.max_epochs=4", "trainer.limit_train_batches=1.0", "model.optimizer.lr=0.05"]
    else:
        overrides = ["trainer.max_epochs=1", "trainer.limit_train_batches=200"]
    metrics, _ = train(
        config(tmp_path, *SMALL[model], *QUICK, *overrides, "dropout.rate=0.3", "datamodule.source=synthetic")
    )
    if model == "mlp":
        assert metrics["val/acc"] > 0.6  # of ten classes
    else:
        assert metrics["val/ppl"] < 110  # one word at a time, without context, gives about 120


def test_resume_goes_on_as_if_never_stopped(tmp_path):
    """Two epochs at once, or one and then another from last.ckpt: sampler and schedule are resumed."""
    overrides = [*SMALL["lstm"], *QUICK, SYNTHETIC, "test=false"]
    _, straight = train(config(tmp_path / "straight", *overrides, "trainer.max_epochs=2"))
    train(config(tmp_path / "half", *overrides))
    overrides += ["trainer.max_epochs=2", f"ckpt_path={tmp_path / 'half'}"]
    _, resumed = train(config(tmp_path / "resumed", *overrides))
    assert resumed["trainer"].current_epoch == 2
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=0)


def test_resume_of_a_finished_run_scores_it(tmp_path):
    overrides = [*SMALL["mlp"], *QUICK, SYNTHETIC]
    first, _ = train(config(tmp_path / "a", *overrides))
    again, objects = train(config(tmp_path / "b", *overrides, "ckpt_path=last"))
    assert again["test/acc"] == first["test/acc"]
    assert objects["result"]["per_second"] is None  # not a step was trained


def test_find_checkpoint_takes_the_newest_run_and_prefers_the_end_of_an_epoch(tmp_path):
    names = ("b/interrupted.ckpt", "b/epoch01.ckpt", "b/last.ckpt", "a/c/last.ckpt", "a/interrupted.ckpt")
    for age, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({}, path)
        os.utime(path, times=(time.time() - age, time.time() - age))
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint("last", tmp_path) == str(tmp_path / "b/last.ckpt")
    assert find_checkpoint(str(tmp_path / "a"), tmp_path) == str(tmp_path / "a/c/last.ckpt")
    (tmp_path / "a/c/last.ckpt").unlink()
    assert find_checkpoint(str(tmp_path / "a"), tmp_path) == str(tmp_path / "a/interrupted.ckpt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_checkpoint(str(tmp_path / "nowhere"), tmp_path)


def test_find_checkpoint_passes_over_damaged_ones(tmp_path, caplog):
    names = ("b/epoch02.ckpt", "b/epoch01.ckpt", "b/interrupted.ckpt", "b/last.ckpt", "a/last.ckpt")
    for age, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.save({"weight": torch.zeros(9)}, path)
        os.utime(path, times=(time.time() - age, time.time() - age))
    for name in ("b/last.ckpt", "b/interrupted.ckpt", "b/epoch02.ckpt", "b/epoch01.ckpt"):
        assert find_checkpoint("last", tmp_path) == str(tmp_path / name)
        stamp = (tmp_path / name).stat().st_mtime
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
        os.utime(tmp_path / name, times=(stamp, stamp))
    assert find_checkpoint("last", tmp_path) == str(tmp_path / "a/last.ckpt")
    assert f"{tmp_path / 'b/last.ckpt'} is damaged" in caplog.text
    (tmp_path / "a/last.ckpt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no checkpoint that is whole"):
        find_checkpoint("last", tmp_path)


def test_ctrl_c_leaves_checkpoints_and_log(tmp_path):
    overrides = ["trainer.max_epochs=1000", "trainer.limit_train_batches=40", "trainer.limit_val_batches=1"]
    arguments = [*SMALL["mlp"], *overrides, SYNTHETIC, f"hydra.run.dir={tmp_path}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # Background processes of a shell ignore Ctrl-C, and so would their children.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command(*arguments), cwd=ROOT, **pipes, **heed)
    try:
        last, deadline = tmp_path / "checkpoints" / "last.ckpt", time.monotonic() + 90
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    text = output.decode()
    assert process.returncode == 1, text
    assert f"checkpoints and logs are in {tmp_path}: " in text
    saved = torch.load(tmp_path / "checkpoints" / "interrupted.ckpt", weights_only=True)["global_step"]
    assert f"stopped at step {saved};" in text and f"interrupted.ckpt (step {saved})" in text
    command_to_go_on = text.split("To go on:\n")[1].splitlines()[0]
    assert "model.hidden=[96,64]" in command_to_go_on and f"ckpt_path={tmp_path}" in command_to_go_on
    assert "Traceback" not in text
    torch.load(last, weights_only=False)
    rows = list(csv.DictReader((tmp_path / "csv" / "metrics.csv").open()))
    assert any(row["val/acc"] for row in rows)
    assert not (tmp_path / "result.json").exists()


def test_a_crash_leaves_the_state_of_its_step(tmp_path, monkeypatch):
    step = MLPClassifier.training_step

    def crash(self, batch, batch_idx):
        if batch_idx == 7:
            raise RuntimeError("out of luck")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MLPClassifier, "training_step", crash)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(config(tmp_path, *SMALL["mlp"], *QUICK, SYNTHETIC))
    assert torch.load(tmp_path / "checkpoints" / "interrupted.ckpt", weights_only=False)["global_step"] == 7
    assert (tmp_path / "csv" / "metrics.csv").is_file()


@pytest.mark.parametrize(("model", "dropout"), [("mlp", "row"), ("lstm", "paper"), ("mlp", "dropconnect")])
def test_command_line_prints_the_result_table(tmp_path, model, dropout):
    folder = tmp_path / "[mnist]" / "[" / "y]"  # no markup: it must be printed as it is
    arguments = [*SMALL[model], *QUICK, f"dropout={dropout}", SYNTHETIC, f"hydra.run.dir='{folder}'"]
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = (
        f"{dropout}, rate 0.5",
        "per second",
        "realised dropout rate",
        "SYNTHETIC",
        "seed",
        f"{folder}/checkpoints/epoch00.ckpt",
    )
    for expected in rows:
        assert expected in done.stdout
    assert ("best possible perplexity" in done.stdout) == (model == "lstm")


def test_a_resumed_run_of_another_rate_ends_in_one_line(tmp_path):
    train(config(tmp_path / "half", *SMALL["mlp"], *QUICK, SYNTHETIC, "test=false"))
    overrides = [*SMALL["mlp"], *QUICK, SYNTHETIC, f"ckpt_path={tmp_path / 'half'}", "dropout.rate=0.3"]
    arguments = command(*overrides, f"hydra.run.dir={tmp_path / 'run'}")
    for full in ("0", "1"):
        environment = os.environ | {"HYDRA_FULL_ERROR": full}
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        assert done.returncode == 1
        assert ("Traceback" in output) == (full == "1")
        if full == "0":
            (line,) = [line for line in output.splitlines() if "rates ['0.5'], the model has ['0.3']" in line]
            assert "[ERROR]" in line and output.count("[ERROR]") == 1


def test_relative_paths_are_meant_from_where_the_program_was_started(tmp_path):
    arguments = [
        "hydra.job.chdir=true",
        f"hydra.run.dir={tmp_path}",
        "data_dir=nowhere/data",
        "datamodule.source=files",
    ]
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"looked in {ROOT / 'nowhere/data'}" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["dropout.rate=abc"], InstantiationException, "rate=abc is neither"),
        (["dropout.rate=1.0"], InstantiationException, r"1.0 is outside \[0, 1\)"),
        (["dropout.rate=-0.5", "dropout=standard"], InstantiationException, r"-0.5 is outside \[0, 1\)"),
        (["dropout.rate=0.95"], MisconfigurationException, "smallest max_dp that serves is 20"),
        (["dropout.pattern=foo"], InstantiationException, "'foo'"),
        (["dropout.backend=foo"], InstantiationException, "'foo'"),
        (["datamodule.source=moon"], InstantiationException, "'moon'"),
        (["dropout.colour=red"], ConfigCompositionException, "dropout.colour"),
        (["run_dir=/dev/null/runs"], OSError, "log folder /dev/null/runs"),
        (["ckpt_path=nowhere.ckpt"], FileNotFoundError, "nowhere.ckpt"),
    ],
)
def test_bad_input_is_refused_before_training(tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        train(config(tmp_path, *SMALL["mlp"], *QUICK, SYNTHETIC, *overrides))
    assert not (tmp_path / "checkpoints").exists()


def test_dropout_none_means_none_whatever_the_rate(tmp_path):
    overrides = ["dropout=none", "dropout.rate=0.7", "test=false"]
    _, objects = train(config(tmp_path, *SMALL["mlp"], *QUICK, SYNTHETIC, *overrides))
    assert objects["result"]["rate"] == objects["result"]["realised_rate"] == 0
    assert objects["model"].hparams.rate == 0


def test_rates_per_layer_reach_their_layers(tmp_path):
    overrides = [*SMALL["mlp"], *QUICK, SYNTHETIC, "dropout.rate=[0.2,0.6]", "dropout.min_gain=0", "test=false"]
    _, objects = train(config(tmp_path, *overrides))
    assert [layer.p for layer in objects["model"].net if isinstance(layer, torch.nn.Dropout)] == [0.2, 0.6]
    assert 0.2 < objects["result"]["realised_rate"] < 0.6
    assert_skips(objects["callbacks"]["dropout"].report, everywhere=True)


def test_a_network_too_small_to_gain_is_trained_as_with_conventional_dropout(tmp_path):
    """Bit for bit: nothing of the callback's is left."""
    found = []
    for dropout in ("row", "standard"):
        overrides = [*SMALL["mlp"], *QUICK, SYNTHETIC, f"dropout={dropout}", "test=false"]
        _, objects = train(config(tmp_path / dropout, *overrides))
        assert objects["result"]["realised_rate"] == "nominal"
        found.append(last_weights(tmp_path / dropout))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_model_brings_its_data_and_the_command_line_wins():
    assert "mnist" in config("x").datamodule._target_
    text = config("x", "model=lstm")
    assert "ptb" in text.datamodule._target_
    assert (text.task.monitor, text.task.unit, text.trainer.gradient_clip_val) == ("val/ppl", "tokens", 5.0)
    assert "mnist" in config("x", "model=lstm", "datamodule=mnist").datamodule._target_
    assert "mnist" in config("x", "experiment=zaremba_small", "datamodule=mnist").datamodule._target_


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_makes_its_model(name):
    from train import make_dropout, make_model

    cfg = config("x", f"experiment={name}")

    class Data:
        vocab_size = 50

    with torch.device("meta"):
        model = make_model(cfg.model, Data())
    assert model.hparams.rate == cfg.dropout.rate
    assert make_dropout(cfg.dropout).__class__.__name__ == "ApproxDropout"
    of_text = ("LSTMLanguageModel", "TransformerLanguageModel")
    assert type(model).__name__ in (of_text if "ptb" in cfg.datamodule._target_ else ("MLPClassifier",))


def test_published_settings_of_zaremba():
    """Table of Zaremba et al. 2014, section 4.1; dropout of the small model can be added."""
    large = config("x", "experiment=zaremba_large")
    assert (large.model.hidden_size, large.model.full_lr_epochs, large.model.lr_decay) == (1500, 14, 1.15)
    assert (large.trainer.max_epochs, large.trainer.gradient_clip_val, large.model.rate) == (55, 10.0, 0.65)
    assert config("x", "experiment=zaremba_small").model.rate == 0
    assert config("x", "experiment=zaremba_small", "dropout.rate=0.5").model.rate == 0.5
