"""A callback for ``train.py`` that records every training step, for comparing runs step by step."""

import hashlib
import json
import os

import torch
from lightning.pytorch.callbacks import Callback

from approxdrop_lightning import ApproxDropout


class Trace(Callback):
    """Appends a JSON line with patterns and loss per step, unbuffered, so that a kill loses none."""

    def __init__(self, path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        callback = next(c for c in trainer.callbacks if isinstance(c, ApproxDropout))
        patterns = [p for site in callback.report.sites for p in site.last_patterns]
        drawn = hashlib.sha256(b"".join(p.mask(4).numpy().tobytes() for p in patterns)).hexdigest()[:16]
        loss = outputs["loss"].detach().to(torch.float64).item().hex()
        line = {"step": trainer.global_step, "patterns": drawn, "loss": loss, "pid": os.getpid()}
        os.write(self.file, f"{json.dumps(line)}\n".encode())


class Signal(Callback):
    """Sends a signal to its own process at a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Poison(Callback):
    """Replaces the first value of a batch, once."""

    def __init__(self, step, value):
        self.step, self.value = step, float(value)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            batch[0].view(-1)[0] = self.value
