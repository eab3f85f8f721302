"""Programs in the style of Lightning's documentation, with only the callback added, train and report skipped work."""

import os
import re
import subprocess
import sys

import pytest
from support import PROGRAMS, ROOT

SKIPPED = {
    "mlp": ["backbone.2  0.5   backbone.0  backbone.3", "backbone.5  0.5   backbone.3  head"],
    "lstm": ["drop                 0.5   -         decoder, rnn", "rnn (layer 1)", "consumers' columns"],
    "vit": ["encoder_layer_0.mlp.0", "encoder_layer_1.mlp.3", "producer's rows and consumers' columns"],
}


@pytest.mark.parametrize("name", list(SKIPPED))
def test_program(name, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(PROGRAMS / f"{name}.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    output = run.stdout + run.stderr
    assert all(text in output for text in SKIPPED[name])
    before, after = map(float, re.search(r"val_loss (\S+) -> (\S+)", output).groups())
    assert after < 0.8 * before
    saved = int(re.search(r"saved in expectation: .*\((\d+)% of their multiplies", output).group(1))
    assert saved >= 15
