"""What the README shows works as it stands: its Python runs, its commands are understood."""

import itertools
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from support import ROOT

from approxdrop_lightning.benchmark.__main__ import _parser
from train import make_dropout

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = [line.strip() for line in re.findall(r"python train\.py([^#`\n]*)", README)]
BENCHMARK = re.findall(r"`(?:python -m approxdrop_lightning\.benchmark|\.{3}) ((?:mlp|lstm|ops) [^`]*)`", README)
CHOICES = dict(re.findall(r"`(\w+)=((?:\w+\|)+\w+)", README))


def composed(*overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", ["run_dir=nowhere", "data_dir=nowhere", *overrides])
    OmegaConf.to_container(config, resolve=True)
    return config


def test_the_example_runs_and_prints_the_report_that_it_shows(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for code in blocks:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    shown = re.search(r"    dropout  rate .*?\n\n", README, flags=re.DOTALL).group()
    assert "\n".join(line[4:] for line in shown.strip("\n").split("\n")) in capsys.readouterr().out


def test_there_are_commands_to_check():
    assert len(TRAINING) >= 8 and "dropout=tile" in TRAINING
    assert len(BENCHMARK) >= 5
    assert {"dropout", "experiment", "debug", "logger"} <= set(CHOICES)


@pytest.mark.parametrize("command", TRAINING)
def test_what_a_training_command_overrides_exists(command):
    """Every value of a sweep is composed, but not every combination; the callback takes what it is given."""
    overrides = [text for text in shlex.split(command) if text not in ("-m", "--multirun")]
    values = []
    for override in OverridesParser.create().parse_overrides(overrides):
        swept = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_string()]
        values.append([f"{override.get_key_element()}={value}" for value in swept])
    jobs = itertools.zip_longest(*values)
    for job in list(jobs) or [()]:
        config = composed(*(text or last[-1] for text, last in zip(job, values, strict=True)))
        if "_target_" in config.dropout:
            make_dropout(config.dropout)


@pytest.mark.parametrize("group", list(CHOICES))
def test_the_choices_of_a_group_are_those_that_there_are(group):
    named = set(CHOICES[group].split("|"))
    assert named == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def test_the_parts_of_a_pattern_that_are_named_can_be_overridden():
    listed = re.search(r"`dropout\.rate`((?:,\s*`\.\w+`)+) override parts", README).group(1)
    keys = set(composed("dropout=row").dropout) | set(composed("dropout=tile").dropout)
    assert {"max_dp", "orders", "tile_size"} <= set(re.findall(r"\.(\w+)", listed)) <= keys


@pytest.mark.parametrize("command", BENCHMARK)
def test_the_arguments_of_a_benchmark_command_are_known(command):
    _parser().parse_args(shlex.split(command))
