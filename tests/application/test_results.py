"""The result table prints all values verbatim, whatever they look like."""

import pytest

from approxdrop_lightning.application import results
from approxdrop_lightning.application.comparison import comparison_table
from approxdrop_lightning.application.results import print_table

RECORD = {
    "model": "MLPClassifier", "dropout": "row", "rate": [0.2, 0.5], "seed": 0, "metric": "test/acc",
    "best_validation": 0.5, "test": 0.5, "unit": "samples", "per_second": 1.0, "realised_rate": 0.5,
    "data_source": "files", "best_perplexity": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "folder", ["/runs/[mnist]/a", "/runs/[/y]", "/runs/[bold]x[/bold]", "/runs/:smile:/\\[red]", "/runs/[link=x]"]
)
def test_a_path_is_printed_as_it_is(folder, capsys):
    print_table(
        RECORD | {"log_dir": folder, "best_checkpoint": f"{folder}/[1].ckpt", "data_source": f"files ({folder})"}
    )
    printed = capsys.readouterr().out
    assert printed.count(folder) == 3
    assert f"{folder}/[1].ckpt" in printed
    assert "[0.2, 0.5]" in printed


def test_synthetic_data_is_named_loudly_and_as_it_is(capsys):
    print_table(RECORD | {"log_dir": "a", "best_checkpoint": "", "data_source": "synthetic [/x]"})
    assert "SYNTHETIC [/X]: not real data" in capsys.readouterr().out


def test_paths_are_relative_to_where_the_program_was_started(tmp_path, monkeypatch, capsys):
    """Whatever directory Hydra has changed to for the job."""
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    monkeypatch.chdir(run)
    monkeypatch.setattr(results, "to_absolute_path", lambda path: str(tmp_path / path))
    print_table(RECORD | {"log_dir": str(run), "best_checkpoint": "/elsewhere/best.ckpt"})
    printed = capsys.readouterr().out
    assert "outputs/run " in printed and "/elsewhere/best.ckpt" in printed and str(tmp_path) not in printed


def test_the_comparison_prints_names_as_they_are(capsys):
    folder = "/data/[mnist]/:smile:/[/y]\\"
    run = RECORD | {"data_source": f"files ({folder})", "rate": 0.5, "seconds_per_step": 0.1, "steps": 10}
    results.show(comparison_table([run | {"dropout": "standard"}, run | {"dropout": "[red]"}]))
    printed = capsys.readouterr().out
    assert f"side by side: files ({folder})" in printed
    assert "[red]" in printed and "conventional dropout" in printed
