"""``train.py`` under signals, full disks, damaged or mismatched checkpoints, and NaN losses."""

import functools
import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from support.checkpoints import small_disk
from support.faults import runs

import datamodules.mnist
from train import find_checkpoint

pytestmark = [
    pytest.mark.skipif("APPROXDROP_DATA" not in os.environ, reason="APPROXDROP_DATA is not set"),
    pytest.mark.filterwarnings("ignore"),
]
#: Two epochs of 21 steps.
SHORT = ["trainer.max_epochs=2", "datamodule.train_limit=1300", "callbacks.recent.every_n_train_steps=0"]


@pytest.fixture(autouse=True, scope="module")
def _images_are_read_once():
    read = datamodules.mnist._read_files
    datamodules.mnist._read_files = functools.cache(read)
    yield
    datamodules.mnist._read_files = read


def run(folder, *overrides, model="mlp"):
    short = [text for text in SHORT if model == "mlp" or "train_limit" not in text]
    return runs.here(model, folder, None, *short, *overrides)


def weights(objects):
    return {key: value.clone() for key, value in objects["model"].state_dict().items()}


def assert_same(found, expected):
    (metrics, objects), (expected_metrics, expected_weights) = found, expected
    torch.testing.assert_close(weights(objects), expected_weights, rtol=0, atol=0)
    for name in ("val/acc", "test/acc", "dropout/realised_rate"):
        assert metrics[name] == expected_metrics[name], name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Metrics and weights of an undisturbed run."""
    metrics, objects = run(tmp_path_factory.mktemp("whole") / "run")
    return metrics, weights(objects)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Folder of a run that stopped after its first epoch."""
    folder = tmp_path_factory.mktemp("half") / "run"
    run(folder, "trainer.max_epochs=1")
    return folder


@pytest.mark.parametrize("step", [pytest.param(5, marks=pytest.mark.slow), 30])
def test_sigterm_leaves_the_state_of_its_step_and_a_resumed_run_is_exact(tmp_path, whole, step):
    with pytest.raises(SIGTERMException):
        run(
            tmp_path / "run",
            f"+callbacks.signal={{_target_:support.faults.record_steps.Signal,step:{step},number:15}}",
        )
    interrupted = tmp_path / "run" / "checkpoints" / "interrupted.ckpt"
    assert runs.checkpoint(interrupted)["global_step"] == step
    assert not list(tmp_path.rglob("*.tmp"))
    assert_same(run(tmp_path / "again", f"ckpt_path={interrupted}"), whole)


@pytest.mark.slow
def test_ctrl_c_within_the_second_epoch_is_resumed_from_the_end_of_the_first(tmp_path, whole):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path / "run", "+callbacks.signal={_target_:support.faults.record_steps.Signal,step:30,number:2}")
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    checkpoints = tmp_path / "run" / "checkpoints"
    assert find_checkpoint("last", tmp_path) == str(checkpoints / "last.ckpt")
    assert (checkpoints / "interrupted.ckpt").is_file()
    assert_same(run(tmp_path / "again", "ckpt_path=last"), whole)


STOCK = """
import os, signal, torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
class Stop(Callback):
    def on_train_batch_end(self, *_):
        os.kill(os.getpid(), {number})
options = {{"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 1}}
Trainer(callbacks=[Stop()], **options).fit(BoringModel())
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_exit_status_is_lightnings(tmp_path, number):
    # Background processes inherit that Ctrl-C is ignored.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    stock = subprocess.run(
        [sys.executable, "-c", STOCK.format(number=int(number))], cwd=tmp_path, check=False, **heeds
    )
    stop = f"+callbacks.signal={{_target_:support.faults.record_steps.Signal,step:30,number:{int(number)}}}"
    status, output = runs.finish(runs.start("mlp", tmp_path / "run", None, *SHORT, stop, **heeds))
    assert status == stock.returncode, output
    print(f"{number.name}: exit status {status}")
    assert f"stopped at step 30; checkpoints and logs are in {tmp_path / 'run'}" in output
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")) == [
        "epoch00.ckpt", "interrupted.ckpt", "last.ckpt",
    ]  # fmt: skip


def test_a_full_disk_is_named_and_the_last_checkpoint_serves(tmp_path, whole):
    """Space for the two checkpoints of the first epoch, but not for a third."""
    with small_disk(tmp_path / "disk", "size=12m") as disk:
        with pytest.raises(OSError, match="checkpoint could not be written: No space left on device"):
            run(disk / "run")
        found = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert found == ["epoch00.ckpt", "last.ckpt"]
        assert runs.checkpoint(disk / "run" / "checkpoints" / "last.ckpt")["epoch"] == 0
        assert_same(run(tmp_path / "again", f"ckpt_path={disk}"), whole)


def copy_of(half, tmp_path):
    folder = tmp_path / "old" / "checkpoints"
    folder.mkdir(parents=True)
    for path in (half / "checkpoints").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("damage", ["truncated", "altered", pytest.param("empty", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_named_and_an_older_one_serves(tmp_path, half, whole, damage):
    last = copy_of(half, tmp_path) / "last.ckpt"
    content = bytearray(last.read_bytes())
    if damage == "altered":
        content[len(content) // 2] ^= 1  # one bit of a weight
    last.write_bytes({"truncated": content[: len(content) // 2], "altered": content, "empty": b""}[damage])
    with pytest.raises(ValueError, match=f"checkpoint {last} is damaged"):
        run(tmp_path / "explicit", f"ckpt_path={last}")
    assert not list((tmp_path / "explicit").rglob("*.ckpt"))
    if damage == "truncated":
        assert_same(run(tmp_path / "again", "ckpt_path=last"), whole)  # epoch00.ckpt is of the same step
    else:
        assert find_checkpoint("last", tmp_path) == str(last.with_name("epoch00.ckpt"))


@pytest.mark.parametrize(
    ("model", "overrides", "error", "message"),
    [
        ("lstm", [], RuntimeError, "Missing key.*embedding.weight"),
        ("mlp", ["model.hidden=[512,128]"], RuntimeError, "size mismatch for net.4.weight"),
        pytest.param("mlp", ["model.hidden=[512]"], RuntimeError, "Unexpected key", marks=pytest.mark.slow),
        ("mlp", ["dropout.max_dp=12"], MisconfigurationException, "max_dp was 10, now it is 12"),
        ("mlp", ["dropout.rate=0.3"], MisconfigurationException, r"rates \['0.5'\], the model has \['0.3'\]"),
        ("mlp", ["dropout=paper"], MisconfigurationException, "interleave was True, now it is False"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_before_training(tmp_path, half, model, overrides, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        run(tmp_path / "run", *overrides, f"ckpt_path={half}", model=model)
    assert not list(tmp_path.rglob("*.ckpt"))  # a failed run never leaves the newest checkpoint
    assert find_checkpoint("last", half.parent) == str(half / "checkpoints" / "last.ckpt")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_another_pattern_family_begins_its_own_sequence_and_lightning_says_so(tmp_path, half):
    with pytest.warns(UserWarning, match="Please add the following callbacks.*ApproxDropout.*row"):
        _, objects = run(tmp_path / "run", "dropout=tile", f"ckpt_path={half}")
    assert objects["trainer"].global_step == 42
    assert objects["callbacks"]["dropout"]._steps == 21


@pytest.mark.slow
def test_a_checkpoint_of_conventional_dropout_goes_on_with_the_callback(tmp_path):
    run(tmp_path / "standard", "dropout=standard", "trainer.max_epochs=1")
    _, objects = run(tmp_path / "row", "ckpt_path=last")
    assert objects["trainer"].global_step == 42
    assert objects["callbacks"]["dropout"]._steps == 21


@pytest.mark.parametrize("value", ["inf", pytest.param("nan", marks=pytest.mark.slow)])
def test_a_loss_that_is_no_number_ends_the_run_before_it_spoils_the_weights(tmp_path, whole, value):
    poison = f"+callbacks.poison={{_target_:support.faults.record_steps.Poison,step:25,value:{value}}}"
    with pytest.raises(FloatingPointError, match="the training loss is nan at step 25"):
        run(tmp_path / "run", poison)
    for path in tmp_path.rglob("*.ckpt"):
        assert all(value.isfinite().all() for value in runs.checkpoint(path)["state_dict"].values()), path
    if value == "nan":
        assert_same(run(tmp_path / "again", "ckpt_path=last"), whole)


@pytest.mark.slow
def test_a_run_that_diverges_ends_with_an_error(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the training loss is (nan|inf) at step \d"):
        run(tmp_path / "run", "model.optimizer.lr=1e30")


@pytest.mark.parametrize(
    ("model", "overrides", "steps"),
    [
        ("mlp", ["datamodule.train_limit=5"], 1),  # less than a batch
        pytest.param("mlp", ["datamodule.train_limit=1"], 1, marks=pytest.mark.slow),
        ("mlp", ["datamodule.train_limit=65"], 2),  # the last batch of one image
        ("mlp", ["datamodule.train_limit=3", "datamodule.batch_size=1", "datamodule.val_size=1"], 3),
        pytest.param("lstm", ["datamodule.unroll=1", "trainer.limit_train_batches=20"], 20, marks=pytest.mark.slow),
        pytest.param(
            "lstm",
            ["datamodule.batch_size=1", "datamodule.eval_batch_size=1", "trainer.limit_train_batches=20"],
            20,
            marks=pytest.mark.slow,
        ),
        pytest.param("lstm", ["datamodule.unroll=500"], 1, marks=pytest.mark.slow),  # more than there are
    ],
)
def test_the_smallest_data(tmp_path, model, overrides, steps):
    small = ["trainer.max_epochs=1", "trainer.limit_val_batches=2", "trainer.limit_test_batches=1"]
    given = SHORT[2:] + (["datamodule.fraction=0.002"] if model == "lstm" else [])
    metrics, objects = runs.here(model, tmp_path / "run", None, *given, *small, *overrides)
    assert objects["trainer"].global_step == steps
    assert all(torch.isfinite(value).all() for value in weights(objects).values())
    assert all(value == value for value in metrics.values())
