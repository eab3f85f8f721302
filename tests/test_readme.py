"""The README's Python example runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_runs_and_prints_the_report_that_it_shows(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    shown = re.search(r"    dropout  rate .*?\n\n", text, flags=re.DOTALL).group()
    assert "\n".join(line[4:] for line in shown.strip("\n").split("\n")) in capsys.readouterr().out
