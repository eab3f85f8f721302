"""Everything shown in README and docs works: Python code and every command run, at a small size."""

import json
import re
import shlex
import tomllib
from dataclasses import dataclass

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from support import ROOT
from support.runs_of_train import SMALL, config

from approxdrop_lightning.application import time_to_quality
from approxdrop_lightning.benchmark import __main__ as benchmark
from approxdrop_lightning.benchmark import gpu
from approxdrop_lightning.distribution import __main__ as distribution
from approxdrop_lightning.options import CallbackOptions, defaults
from train import compare, train

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
README, GUIDE = TEXTS["README.md"], TEXTS["guide.md"]
OPTIONAL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
#: Prefixes of the commands that may be shown; each is checked below.
PROGRAMS = ("python", "pip", "pytest", "mkdocs", "ruff", "mypy", "tensorboard", "pre-commit", "git", ".ci/run")

QUICKEST = [
    *("trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"),
    *("trainer.limit_test_batches=1", "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false"),
    *("trainer.log_every_n_steps=1", "callbacks.throughput.warmup_steps=0", "callbacks.throughput.window_size=2"),
]
MODELS = {
    "MLPClassifier": "mlp",
    "LSTMLanguageModel": "lstm",
    "TransformerLanguageModel": "transformer",
    "SIGNClassifier": "sign",
    "ClickModel": "ctr",
}


@dataclass(frozen=True)
class Command:
    document: str
    text: str

    @property
    def words(self):
        return shlex.split(self.text, comments=True)

    def __str__(self):
        return f"{self.document}: {self.text}"


def commands():
    """Lines of indented and fenced blocks, and code between backticks, that start like a command."""
    found = []
    for document, text in TEXTS.items():
        blocks = [line.strip() for line in re.findall(r"^    (\S.*)$", text, flags=re.MULTILINE)]
        # Code between backticks may span lines; code blocks contain none.
        inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`|]+)`(?!`)", text)]
        for line in [*blocks, *inline]:
            for part in line.split(" && "):
                # A single word is a name, <name> a placeholder; three dots stand for the preceding command.
                is_command = part.startswith("... ") or part.split()[0] in PROGRAMS
                if is_command and " " in part and "<" not in part:
                    found.append(Command(document, part.split("  #")[0].strip()))
    return list({command.text: command for command in reversed(found)}.values())[::-1]


COMMANDS = commands()


def of(*beginnings):
    return [command for command in COMMANDS if command.text.startswith(beginnings)]


TRAINING = of("python train.py")
BENCHMARKS = of("python -m approxdrop_lightning.benchmark", "... mlp", "... lstm", "... ops")


def test_there_are_commands_to_check():
    texts = [command.text for command in TRAINING]
    assert len(TRAINING) >= 25
    assert {"python train.py", "python train.py compare=true", "python train.py dropout=tile"} <= set(texts)
    assert any("-m dropout" in text for text in texts)
    assert len(BENCHMARKS) >= 12
    assert "pip install -e '.[train]'" in [command.text for command in of("pip")]


def test_python_that_is_shown_runs_and_prints_the_report_that_is_shown(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = {name: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for name, text in TEXTS.items()}
    assert blocks["README.md"] and blocks["guide.md"]
    for name, codes in blocks.items():
        for code in codes:
            exec(compile(code, name, "exec"), {"__name__": "shown"})
    shown = re.search(r"    dropout  rate .*?\n\n", README, flags=re.DOTALL).group()
    assert "\n".join(line[4:] for line in shown.strip("\n").split("\n")) in capsys.readouterr().out


def test_readme_is_one_page_and_its_example_ten_lines():
    assert len(README.split()) < 800
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def first_job(command, tmp_path):
    """The overrides of the command's first job, with existing files in place of /path/to/... ."""
    overrides = [word for word in command.words[2:] if word not in ("-m", "--multirun")]
    chosen = []
    for override in OverridesParser.create().parse_overrides(overrides):
        swept = next(override.sweep_string_iterator()) if override.is_sweep_override() else None
        chosen.append(f"{override.get_key_element()}={swept or override.get_value_string()}")
    text = tmp_path / "text"
    text.mkdir()
    for part in ("train", "valid", "test"):
        (text / f"{part}.txt").write_text("it was the best of times it was the worst of times\n" * 20)
    chosen = [word.replace("/path/to/text", str(text)) for word in chosen if not word.startswith("hydra/")]
    if any("/path/to/data" in word for word in chosen):  # which may not exist here
        return [word for word in chosen if "/path/to/data" not in word and word != "datamodule.source=files"]
    return chosen


@pytest.mark.parametrize("command", TRAINING, ids=str)
def test_a_training_command_trains(tmp_path, monkeypatch, command):
    """With two batches of the embedded data; the first job of a sweep; resuming after a first run."""
    monkeypatch.delenv("APPROXDROP_DATA", raising=False)
    overrides = first_job(command, tmp_path)
    composed = config("x", *overrides)
    if "source" in composed.datamodule and not composed.datamodule.get("text"):
        overrides = [word for word in overrides if not word.startswith("datamodule.source")]
        overrides.append("datamodule.source=embedded")
    name = MODELS[composed.model._target_.rsplit(".", 1)[1]]
    small = [*(word for word in SMALL[name] if not word.startswith("model=")), *QUICKEST]
    runs = [[word for word in overrides if not word.startswith("ckpt_path")], overrides]
    for number, words in enumerate(runs if "ckpt_path=last" in overrides else [overrides]):
        cfg = config(tmp_path / "runs" / str(number), *words, *small)
        metrics, objects = (compare if cfg.compare else train)(cfg)
    assert "ckpt_path=last" in overrides or metrics["train/loss"] > 0
    assert objects["result"]["dropout"] == cfg.dropout.name
    assert objects["result"]["data_source"]
    assert ("baseline" in objects) == ("compare=true" in overrides)


@pytest.mark.parametrize("command", [command for command in TRAINING if " -m " in command.text], ids=str)
def test_every_value_of_a_sweep_exists(command):
    """Each one separately, along with what is fixed."""
    parsed = OverridesParser.create().parse_overrides([word for word in command.words[2:] if word != "-m"])
    fixed = [override.input_line for override in parsed if not override.is_sweep_override()]
    swept = [override for override in parsed if override.is_sweep_override()]
    assert swept or any(word.startswith("hydra/") for word in fixed)
    for override in swept:
        if override.get_key_element() != "seed":
            for value in override.sweep_string_iterator():
                cfg = config("x", *fixed, f"{override.get_key_element()}={value}")
                OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize("command", BENCHMARKS, ids=str)
def test_a_benchmark_command_measures(command, capsys):
    words = command.words[1:] if command.text.startswith("...") else command.words[3:]
    if words[0] == "gpu":  # all that a GPU can show, within minutes
        gpu._parser().parse_args(words[1:])
        return
    asked = benchmark._parser().parse_args(words)
    if asked.device == "cuda" and not torch.cuda.is_available():
        return  # its arguments are known
    words = [word for word in words if word not in ("compiled", "--compile", "--profile")]  # which take long
    hidden = ["64", "64"] if asked.kind != "lstm" else ["64"]
    small = ["--batch", "8", "--steps", "3", "--vocabulary", "50", "--repeats", "1", "--consecutive", "1"]
    benchmark.main([*words, "--hidden", *hidden, *small, "--rate", str(asked.rate[0])])
    assert "conventional" in capsys.readouterr().out


@pytest.mark.parametrize("command", of("python -m approxdrop_lightning.distribution"), ids=str)
def test_a_distribution_command_prints_and_draws(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    distribution.main(command.words[3:])
    assert "entropy" in capsys.readouterr().out
    assert bool(list(tmp_path.glob("*.png"))) == ("--plot" in command.words)


@pytest.mark.parametrize("command", of("python -m approxdrop_lightning.application.time_to_quality"), ids=str)
def test_time_to_quality_reads_a_sweep(command, tmp_path, capsys):
    run = {"model": "M", "dropout": "standard", "rate": 0.5, "seed": 0, "monitor": "val/ppl", "metric": "test/ppl"}
    (tmp_path / "result.json").write_text(json.dumps(run | {"seconds_per_step": 1.0}))
    (tmp_path / "metrics.csv").write_text("epoch,step,val/ppl\n0,9,90\n")
    places = ("logs/multirun", "FOLDER_OF_A_SWEEP")
    assert time_to_quality.main([str(tmp_path) if word in places else word for word in command.words[3:]])


@pytest.mark.parametrize("command", of("pip install"), ids=str)
def test_extras_that_are_installed_exist(command):
    extras = re.findall(r"\[([\w,]+)\]", command.text)
    assert {extra for found in extras for extra in found.split(",")} <= set(OPTIONAL)
    assert extras or command.text in ("pip install -e .", "pip install pre-commit")


@pytest.mark.parametrize("command", of("pytest"), ids=str)
def test_tests_that_are_named_exist(command):
    for word in command.words:
        assert "/" not in word or word.startswith("-") or (ROOT / word.split("::")[0]).exists(), word


def test_every_test_file_that_is_named_exists():
    named = {path for text in TEXTS.values() for path in re.findall(r"tests/[\w/]+\.py", text)}
    assert len(named) > 15
    assert not [path for path in named if not (ROOT / path).is_file()]


def test_every_python_command_is_one_of_those_that_are_run():
    run = {*TRAINING, *BENCHMARKS, *of("python -m approxdrop_lightning.distribution")}
    run |= {*of("python -m approxdrop_lightning.application.time_to_quality")}
    # The programs in examples/ and the compilation of kernels have separate tests.
    elsewhere = of(
        "python examples/", "python -m approxdrop_lightning.ops.triton.aot", "python datamodules/embedded/"
    )
    assert not set(of("python")) - run - set(elsewhere)


@pytest.mark.parametrize("group", ["dropout", "experiment", "debug", "logger"])
def test_the_choices_of_a_group_are_those_that_there_are(group):
    named = re.search(rf"`{group}=((?:\w+\|)+\w+)", GUIDE).group(1)
    assert set(named.split("|")) == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def test_the_models_that_are_named_are_those_that_there_are():
    named = re.search(r"^\| `model` \| (.*) \|$", GUIDE, flags=re.MULTILINE).group(1)
    assert set(re.findall(r"`(\w+)`", named)) == {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}


def test_every_option_is_described_and_no_other():
    tables = GUIDE[GUIDE.index("### Options of the dropout") : GUIDE.index("## Resume")]
    first_cells = re.findall(r"^\| (`.*?`) \|", tables, flags=re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == {name for name in defaults(CallbackOptions) if name not in ("block_size", "scale")}


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[path.name]):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_site_has_every_page():
    pages = set(re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert pages == {path.name for path in (ROOT / "docs").glob("*.md")}
