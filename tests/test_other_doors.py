"""Other entry points: a plain loop, LightningCLI, any Hydra application, the installed wheel."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile

import pytest
import torch
from packaging.requirements import Requirement
from support import ROOT
from torch import nn

import approxdrop_lightning
from approxdrop_lightning import approximate, resample, restore


def python(code, *arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_a_plain_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 2))
    x = torch.randn(256, 16)
    y = (x.sum(1) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    report = approximate(model, min_gain=0, seed=0)
    for _ in range(60):
        resample(model)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    restore(model)
    assert report.saved == pytest.approx(0.5)
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.95


CLI = """
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule
import approxdrop_lightning  # makes the callback known by its bare name
from lightning import LightningModule
class Net(LightningModule):
    def __init__(self, rate: float = 0.5):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Dropout(rate), torch.nn.Linear(64, 2))
    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
if __name__ == "__main__":
    cli = LightningCLI(Net, BoringDataModule)
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "ApproxDropout"]
    print("REALISED", round(callback.realised_rate, 2))
"""
QUIET = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"]


def test_lightning_cli(tmp_path):
    added = [
        "--trainer.callbacks+=ApproxDropout",
        "--trainer.callbacks.rate=0.75",
        "--trainer.callbacks.min_gain=0",
        "--trainer.callbacks.concentration=.inf",
    ]
    run = python(CLI, "fit", *QUIET, "--trainer.max_epochs=1", *added, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "REALISED 0.75\n" in run.stdout


def test_lightning_cli_help_is_the_docstring(tmp_path):
    run = python(CLI, "fit", "--trainer.callbacks.help=ApproxDropout", cwd=tmp_path)
    assert "Dropout rate of all sites" in " ".join(run.stdout.split())


HYDRA = """
import hydra, sys
assert "torch" not in sys.modules
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins
Plugins.instance()
assert "torch" not in sys.modules, "the plugin imports torch"
with initialize_config_dir(sys.argv[1], version_base="1.3"):
    cfg = compose("config", [f"callbacks={sys.argv[2]}", "callbacks.approx_dropout.rate=0.3"])
callback = hydra.utils.instantiate(cfg.callbacks)["approx_dropout"]
print(callback.options)
"""


@pytest.mark.parametrize(("name", "interleave"), [("approx_dropout", True), ("approx_dropout_paper", False)])
def test_any_hydra_application(tmp_path, name, interleave):
    (tmp_path / "config.yaml").write_text("defaults:\n  - callbacks: null\n")
    run = python(HYDRA, str(tmp_path), name, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "rate=0.3, pattern='row'" in run.stdout and f"interleave={interleave}" in run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built by ``python -m build``."""
    return build(tmp_path_factory, "wheel", "*.whl")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, likewise."""
    return build(tmp_path_factory, "sdist", "*.tar.gz")


def build(tmp_path_factory, kind, name):
    out = tmp_path_factory.mktemp(kind)
    run = subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), str(ROOT)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if run.returncode and "No matching distribution" in run.stdout + run.stderr:
        pytest.skip("the build backend is not installed and no package index can be reached")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return next(out.glob(name))


def test_the_source_distribution_holds_the_application_and_its_data(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for wanted in ("train.py", "conf/train.yaml", "datamodules/mnist.py", "examples/plain_loop.py",
                   "datamodules/embedded/mnist_part.npz", "datamodules/embedded/austen.train.txt.bz2",
                   "datamodules/embedded/README.md"):  # fmt: skip
        assert wanted in names
    assert approxdrop_lightning.__version__ in sdist.name


def test_the_wheel_holds_the_package_and_nothing_of_the_application(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("approxdrop_lightning/callback.py", "approxdrop_lightning/py.typed",
                   "approxdrop_lightning/ops/native/copies.c",
                   "approxdrop_lightning/conf/callbacks/approx_dropout.yaml",
                   "hydra_plugins/approxdrop_lightning/__init__.py"):  # fmt: skip
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "hydra_plugins/__init__.py" not in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "approxdrop_lightning",
        "hydra_plugins",
    }


USE = """
import sys
if "-no-triton" in sys.argv:
    sys.modules["triton"] = None
import torch
from lightning import Trainer
before = set(sys.modules)
import approxdrop_lightning
assert approxdrop_lightning.__file__.startswith(sys.prefix), approxdrop_lightning.__file__
assert "triton" not in set(sys.modules) - before
from lightning.pytorch.demos.boring_classes import BoringModel
class Net(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 2))
callback = approxdrop_lightning.ApproxDropout(min_gain=0)
options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Trainer(max_steps=3, accelerator="cpu", callbacks=[callback], **options).fit(Net())
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
with initialize_config_module("hydra.conf", version_base="1.3"):
    config = compose(overrides=["+callbacks=approx_dropout"])
print(type(instantiate(config.callbacks.approx_dropout)).__name__, "saved", round(callback.report.saved, 2))
"""


def install(venv, *what, interpreter=sys.executable):
    """Python of an environment, created if necessary, in which pip has installed something."""
    if not venv.exists():
        subprocess.run([interpreter, "-m", "venv", str(venv)], check=True, timeout=120)
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *map(str, what)],
        capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip
    assert pip.returncode == 0, pip.stderr[-2000:]
    return python


def use(python, cwd, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python, *(arguments if "-m" in arguments else ("-c", USE, *arguments))],
        cwd=cwd, env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip


def test_the_installed_wheel_works_without_triton_and_gpu(wheel, tmp_path):
    """Installed by pip, with the dependencies of this environment, to avoid downloads."""
    python = install(tmp_path / "venv", "--no-deps", wheel)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    run = use(python, tmp_path, "-no-triton")
    assert "ApproxDropout saved 0.5" in run.stdout, run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_an_empty_environment_needs_nothing_but_the_package(wheel, sdist, version, tmp_path):
    """Downloads gigabytes. Wheel, then source distribution; without Triton, and with it if PyTorch includes it."""
    interpreter = shutil.which(f"python{version}")
    if interpreter is None or subprocess.run([interpreter, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"there is no python{version} on PATH")
    for package in (wheel, sdist):
        options = ["--force-reinstall", "--no-deps"] if package is sdist else []
        python = install(tmp_path / "venv", *options, package, interpreter=interpreter)
        for arguments in ((), ("-no-triton",)):
            run = use(python, tmp_path, *arguments)
            assert "ApproxDropout saved 0.5" in run.stdout, run.stderr[-2000:]
        table = use(python, tmp_path, "-m", "approxdrop_lightning.distribution", "0.5")
        assert "patterns" in table.stdout, table.stderr[-2000:]
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.slow
def test_the_oldest_versions_that_are_allowed_work(wheel, tmp_path):
    """Downloads gigabytes. Some of the tests run with the lower bound of every dependency that has one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    oldest = []
    for found in map(Requirement, [*project["dependencies"], *extras["sweep"], *extras["triton"], *extras["test"]]):
        if found.name != project["name"]:
            floors = [bound.version for bound in found.specifier if bound.operator == ">="]
            extra = f"[{','.join(found.extras)}]" if found.extras else ""
            oldest.append(found.name + extra + "".join(f"=={floor}" for floor in floors))
    # Triton 3.4's interpreter takes arrays of one entry for numbers, which later releases of NumPy refuse.
    python = install(tmp_path / "venv", wheel, "numpy<2.3", *oldest)
    tests = ("test_callback.py", "test_functional.py", "test_monitor.py", "test_readme.py", "ops/native",
             "ops/test_backend.py", "patterns/test_sampler.py", "application/models")  # fmt: skip
    files = [str(ROOT / "tests" / name) for name in tests]
    cli = str(ROOT / "tests" / "test_other_doors.py") + "::test_lightning_cli"
    run = use(python, ROOT, "-m", "pytest", "-p", "no:cacheprovider", *files, cli)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    shutil.rmtree(tmp_path / "venv")
