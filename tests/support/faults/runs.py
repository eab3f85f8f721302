"""Starting, killing and comparing runs of ``train.py`` on small parts of the real data."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import torch
from hydra import compose, initialize_config_dir
from support import ROOT, TESTS
from support.skipping import assert_skips

#: Models whose checkpoints are large enough (some megabytes) that writing one takes a moment; three epochs of about
#: 40 steps, a checkpoint after every fourth.
SMALL = {
    "mlp": [
        "dropout.min_gain=0",
        *("model.hidden=[512,256]", "datamodule.train_limit=2600", "datamodule.val_size=500"),
        *("datamodule.batch_size=64", "trainer.limit_test_batches=8"),
    ],
    "lstm": [
        "dropout.min_gain=0",
        *("model=lstm", "model.hidden_size=128", "model.init_range=0.1", "datamodule.batch_size=10"),
        *("datamodule.unroll=12", "datamodule.vocabulary=1000", "datamodule.fraction=0.0055"),
        *("trainer.limit_val_batches=8", "trainer.limit_test_batches=8"),
    ],
}
COMMON = [
    *(
        "datamodule.source=files",
        "trainer.accelerator=cpu",
        "trainer.max_epochs=3",
        "callbacks.recent.every_n_train_steps=4",
    ),
    *("trainer.enable_progress_bar=false", "trainer.enable_model_summary=false", "trainer.log_every_n_steps=1"),
    "+trainer.num_sanity_val_steps=0",
]


def environment(**more):
    paths = os.pathsep.join([str(ROOT), str(TESTS)])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | more


def arguments(model, folder, trace=None, *overrides):
    traced = (
        [] if trace is None else [f"+callbacks.trace={{_target_:support.faults.record_steps.Trace,path:{trace}}}"]
    )
    return [*SMALL[model], *COMMON, f"hydra.run.dir={folder}", *traced, *overrides]


def start(model, folder, trace, *overrides, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": environment()} | options
    command = [sys.executable, str(ROOT / "train.py"), *arguments(model, folder, trace, *overrides)]
    return subprocess.Popen(command, cwd=ROOT, text=True, **options)


def here(model, folder, trace, *overrides):
    """A run in this process, single-threaded like those in subprocesses; returns the result of ``train``."""
    from train import train

    given = [text for text in arguments(model, folder, trace, *overrides) if not text.startswith("hydra.")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*given, f"run_dir={folder}"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        metrics, objects = train(cfg)
    finally:
        torch.set_num_threads(threads)
    if "dropout" in objects["callbacks"]:
        assert_skips(objects["callbacks"]["dropout"].report)
    return metrics, objects


def finish(process, timeout=600):
    """Exit status and output of a run."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def lines(trace):
    """The steps recorded so far, without one that was truncated by a kill."""
    if not trace.exists():
        return []
    return [json.loads(line) for line in trace.read_text().splitlines() if line.endswith("}")]


def kill(process, trace, folder, rng, within_write):
    """``kill -9``: as soon as a checkpoint is being written, or at a random moment.

    Returns:
        Exit status (0: it was done before), output, and whether it died within writing a checkpoint.
    """
    wanted = len(lines(trace)) + rng.randrange(1, 25)
    pause = rng.random() * 0.02
    written = folder / "checkpoints" / "last.ckpt.tmp"
    while process.poll() is None:
        if len(lines(trace)) < wanted:
            time.sleep(0.001)
        elif not within_write:
            time.sleep(pause)
            break
        elif written.exists():
            break
    process.send_signal(signal.SIGKILL)
    status, output = finish(process, 60)
    return status, output, written.exists()


def metrics(folder, columns):
    """Logged values by (column, step) of the runs in or below a folder, as text: compared to the last digit."""
    found = {}
    for file in sorted(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime):
        with file.open(newline="", encoding="utf-8") as rows:
            for row in csv.DictReader(rows):
                for column in columns:
                    if row.get(column):
                        found[column, row["step"]] = row[column]
    return found


def checkpoint(path):
    return torch.load(path, weights_only=True)


def rng(seed):
    return random.Random(seed)
