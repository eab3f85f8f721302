"""Constraints of pyproject.toml on other packages, and imports between parts of the package."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from support import ROOT

import approxdrop_lightning

TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(TEXT)["project"]
EXTRA = PROJECT["optional-dependencies"]["train"]
REQUIRED = {r.name: r.specifier for r in map(Requirement, [*PROJECT["dependencies"], *EXTRA])}


@pytest.mark.parametrize(
    ("package", "releases"),
    [
        ("lightning", ["2.6.2", "2.6.3"]),  # compromised
        ("hydra-core", ["1.4.0", "1.4.0.dev1"]),  # another `instantiate`
    ],
)
def test_releases_known_to_be_bad_are_excluded(package, releases):
    assert not any(REQUIRED[package].contains(release, prereleases=True) for release in releases)


def test_no_release_of_lightning_before_the_compromised_ones_is_taken_in_their_place():
    assert not any(REQUIRED["lightning"].contains(release) for release in ("2.0.0", "2.5.6", "2.6.0", "2.6.1"))
    assert REQUIRED["lightning"].contains("2.6.4")


def test_the_callback_needs_torch_and_lightning_only():
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == {"torch", "lightning"}


def imported(file):
    """Modules that a file imports, also within functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


PACKAGE = ROOT / "approxdrop_lightning"
LIBRARY = sorted(f for f in PACKAGE.rglob("*.py") if "application" not in f.relative_to(PACKAGE).parts)


@pytest.mark.parametrize("file", LIBRARY, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_the_library_never_imports_the_application_or_what_only_it_needs(file):
    top = {name.split(".")[0] for name in imported(file)}
    assert not top & {"torchvision", "hydra", "omegaconf", "tensorboard", "rich", "train", "datamodules"}
    assert not any(name.startswith("approxdrop_lightning.application") for name in imported(file))


def test_importing_the_library_imports_nothing_of_the_application():
    code = (
        "import sys, lightning; before = set(sys.modules); import approxdrop_lightning; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert "approxdrop_lightning" in found
    # So it takes hardly longer than importing Lightning: measured 2% more, all of it our own files.
    assert found - {*sys.stdlib_module_names} <= {"approxdrop_lightning", "torch", "lightning"}
    assert not found & {"torchvision", "hydra", "omegaconf", "tensorboard", "matplotlib", "triton"}


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", approxdrop_lightning.__version__)
    assert tomllib.loads(TEXT)["tool"]["hatch"]["version"]["path"] == "approxdrop_lightning/__init__.py"
    assert "version:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace("cff-version:", "")
    assert f"## [{approxdrop_lightning.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
