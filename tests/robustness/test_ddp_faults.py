"""Two processes on the CPU: one is killed, a thousand steps, resuming with another number of processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT, TESTS

pytestmark = pytest.mark.slow
SCRIPT = """
import json, os, signal, sys
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from support.lightning_nets import Net, data
from approxdrop_lightning import ApproxDropout
from approxdrop_lightning.application.checkpoint import AtomicCheckpointIO

class Steps(Callback):
    def on_train_start(self, trainer, module):
        self.file = open(f"{given['out']}/rank{trainer.global_rank}.jsonl", "w", buffering=1)
        print(json.dumps({"pid": os.getpid()}), file=self.file)

    def on_train_batch_end(self, trainer, module, *_):
        patterns = [p for site in callback.report.sites for p in site.last_patterns]
        line = [[p.dp, p.keep, p.offset, p.order.tolist()] for p in patterns]
        print(json.dumps({"step": trainer.global_step, "patterns": line}), file=self.file)
        if [trainer.global_rank, trainer.global_step] == given["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, trainer, module):
        total = sum(p.double().sum().item() for p in module.parameters())
        print(json.dumps({"weights": total.hex()}), file=self.file)

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    seed_everything(0)
    callback = ApproxDropout(min_gain=0, rate=0.7, block_size=4)
    checkpoint = ModelCheckpoint(given["out"], "{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = Trainer(max_steps=given["steps"], max_epochs=-1, accelerator="cpu", devices=given["devices"],
                      strategy="ddp" if given["devices"] > 1 else "auto", logger=False, enable_progress_bar=False,
                      enable_model_summary=False, plugins=[AtomicCheckpointIO()],
                      callbacks=[callback, checkpoint, Steps()])
    trainer.fit(Net(), data(8), ckpt_path=given["ckpt_path"])
"""


def start(folder, steps, devices=2, ckpt_path=None, kill=None):
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    given = {"out": str(folder), "steps": steps, "devices": devices, "ckpt_path": ckpt_path, "kill": kill}
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, str(folder / "script.py"), json.dumps(given)],
            cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def run(folder, *arguments, **options):
    process = start(folder, *arguments, **options)
    try:
        status = process.wait(timeout=1500)
    finally:
        process.kill()
    assert status == 0, (folder / "output.txt").read_text()[-3000:]
    return [lines(folder, rank) for rank in range(options.get("devices", 2))]


def lines(folder, rank):
    path = folder / f"rank{rank}.jsonl"
    written = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in written if line.endswith("}")]


def patterns(ranks, rank):
    return {line["step"]: line["patterns"] for line in ranks[rank] if "step" in line}


def periods(ranks, rank):
    return {step: [p[:2] for p in drawn] for step, drawn in patterns(ranks, rank).items()}


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_says_why(tmp_path, killed):
    process = start(tmp_path / "run", 100_000, kill=[killed, 25])
    began = time.monotonic()
    try:
        while time.monotonic() < began + 240:
            pids = [line["pid"] for rank in (0, 1) for line in lines(tmp_path / "run", rank)[:1]]
            process.poll()
            if len(pids) == 2 and not alive(pids[killed]):
                break
            time.sleep(0.05)
        died = time.monotonic()
        while alive(pids[1 - killed]) and time.monotonic() < died + 120:
            process.poll()
            time.sleep(0.05)
        waited = time.monotonic() - died
        assert not alive(pids[1 - killed])
    finally:
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)
    output = (tmp_path / "run" / "output.txt").read_text()
    print(f"rank {killed} was killed, the other ended {waited:.1f} s later")
    assert process.returncode != 0
    assert "Connection closed by peer" in output or "Connection reset by peer" in output
    newest = sorted((tmp_path / "run").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)[-1]
    assert torch.load(newest, weights_only=True)["global_step"] == 20


def test_a_thousand_steps_in_step(tmp_path):
    ranks = run(tmp_path / "run", 1000)
    assert len(patterns(ranks, 0)) == 1000
    assert periods(ranks, 0) == periods(ranks, 1)
    different = sum(a != b for a, b in zip(patterns(ranks, 0).values(), patterns(ranks, 1).values(), strict=True))
    assert different > 990  # each process has its own
    assert ranks[0][-1]["weights"] == ranks[1][-1]["weights"]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(tmp_path, before, after):
    straight = run(tmp_path / "straight", 30, devices=after)
    run(tmp_path / "before", 20, devices=before)
    checkpoint = next((tmp_path / "before").glob("step=20.ckpt"))
    resumed = run(tmp_path / "after", 30, devices=after, ckpt_path=str(checkpoint))
    for rank in range(after):
        # The same patterns as without the interruption, different for each rank.
        expected = {step: drawn for step, drawn in patterns(straight, rank).items() if step > 20}
        assert patterns(resumed, rank) == expected
        assert len(expected) == 10
