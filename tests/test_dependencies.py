"""Constraints of pyproject.toml on other packages, and imports between parts of the package."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter

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


def imported(file, for_types=True):
    """Modules that a file imports, also within functions, and those for annotations only if wanted."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if not for_types:
        tree.body = [node for node in tree.body if "TYPE_CHECKING" not in ast.unparse(node).partition(":")[0]]
    for node in ast.walk(tree):
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


def table_rows():
    """Names of modules and folders of the package in each row of the table of docs/how_it_works.md."""
    text = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    table = text.partition("| where | what |\n|---|---|\n")[2].partition("\n\n")[0]
    return [re.findall(r"`([\w/.]+)`", line.split("|")[1]) for line in table.splitlines()]


ROWS = {name.rstrip("/").removesuffix(".py"): i for i, row in enumerate(table_rows()) for name in row}


def test_the_documentation_lists_each_module_and_folder():
    parts = {f.relative_to(PACKAGE) for f in PACKAGE.rglob("*.py")}
    top = {part.parts[0].removesuffix(".py") for part in parts} - {"__init__"}
    assert top == {name for name in ROWS if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}
    text = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    folders = {folder.name for part in parts for folder in part.parents} - {""}
    tracked = {f.name for f in ROOT.iterdir() if f.is_dir() and any(f.glob("*.py"))} | folders
    assert {folder for folder in tracked if f"{folder}/`" not in text} <= {"build", "dist"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_downwards_in_the_table(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = {name for name in imported(file, for_types=False) if name.startswith("approxdrop_lightning.")}
    assert not {name for name in names if own in ROWS and ROWS.get(name.split(".")[1], 99) < ROWS[own]}


def test_no_module_imports_itself_indirectly():
    """By imports at the top of modules."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in LIBRARY}
    graph = {}
    for name, file in files.items():
        nodes = [n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
        found = {(n.module, f"{n.module}.{alias.name}") for n in nodes for alias in n.names}
        graph[name] = {full if full in files else module for module, full in found} & files.keys()
    while leaves := {name for name, found in graph.items() if not found}:
        graph = {name: found - leaves for name, found in graph.items() if name not in leaves}
    assert not graph


def test_no_name_of_a_class_has_two_meanings():
    files = [
        f
        for folder in (PACKAGE, ROOT / "datamodules", ROOT / "examples", ROOT / "tests" / "support")
        for f in folder.rglob("*.py")
    ]
    found = Counter(
        node.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert len(found) > 100 and not [name for name, times in found.items() if times > 1]


def test_tests_do_not_import_tests():
    files = list((ROOT / "tests").rglob("*.py"))
    assert len(files) > 100
    assert not [f.name for f in files if any(name.rpartition(".")[2].startswith("test_") for name in imported(f))]


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
