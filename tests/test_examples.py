"""The programs in examples/ work as described, at a small size, and the notebook runs from top to bottom."""

import io
import logging
import re
import runpy
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from support import ROOT

EXAMPLES = ROOT / "examples"
SMALL = {
    "lightning_mlp.py": "--size 768",
    "language_model.py": "--steps 2",
    "plain_loop.py": "--steps 3",
    "cli.py": (
        "fit --trainer.callbacks+=ApproxDropout --trainer.callbacks.rate=0.7 --trainer.max_epochs=1 --model.size=256 "
        "--trainer.logger=false --trainer.enable_checkpointing=false"
    ),
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run in a new folder, restore this process's state afterwards, and yield what Lightning logs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    # Lightning's handler may write to an outdated stderr.
    handler, logger = logging.StreamHandler(io.StringIO()), logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    random = torch.get_rng_state()
    yield handler.stream
    logger.removeHandler(handler)
    torch.set_rng_state(random)
    torch.compiler.reset()


def skipped(output):
    """Percentage of saved multiplies in the report."""
    return int(re.search(r"saved in expectation: .*\((\d+)% of their multiplies", output).group(1))


@pytest.mark.parametrize("name", SMALL)
def test_an_example_skips_what_it_drops(elsewhere, capsys, name):
    sys.argv = [name, *SMALL[name].split()]
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    said = "".join([*capsys.readouterr(), elsewhere.getvalue()])
    assert skipped(said) >= 30
    expected = {"lightning_mlp.py": "samples per second", "plain_loop.py": "accuracy", "cli.py": "0.7 (own: 0.5)"}
    assert expected.get(name, "perplexity") in said


def test_examples_are_short_and_all_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SMALL)
    for name in SMALL:
        assert 30 <= len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 60, name


def test_the_notebook_runs(elsewhere, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert skipped(said) >= 60
    assert "times as fast" in said
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1
