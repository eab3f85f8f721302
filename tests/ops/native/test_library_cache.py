"""The loader of the compiled kernels: no problem with the machine may stop training."""

import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import ROOT

from approxdrop_lightning.ops.native import library as native

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler on this machine"
)
#: Replaces the compiler: copies a library compiled before, so that tests are fast, and records each call.
COMPILER = """#!/bin/sh
echo call >> {calls}
{before}
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
{after}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library made by the real compiler."""
    path = tmp_path_factory.mktemp("real") / "kernels.so"
    native._run(next(filter(None, map(shutil.which, ("cc", "gcc", "clang")))), str(path))
    return path


class Machine:
    """A cache, a folder for temporary files, and a compiler."""

    def __init__(self, folder, library):
        self.folder, self.library, self.calls = folder, library, folder / "calls"
        self.home, self.cache, self.tmp = folder / "home", folder / "cache", folder / "tmp"
        for made in (self.home, self.tmp, folder / "bin"):
            made.mkdir()
        self.compiler()

    def compiler(self, before="", after="", script=COMPILER):
        path = self.folder / "bin" / "cc"
        text = script.format(calls=self.calls, library=self.library, before=before, after=after)
        path.write_bytes(text.encode("latin-1"))
        path.chmod(0o755)

    @property
    def environment(self):
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        given = {"PATH": path, "XDG_CACHE_HOME": self.cache, "TMPDIR": self.tmp, "HOME": self.home}
        return {name: str(value) for name, value in given.items()}

    @property
    def compiled(self):
        """Number of calls of the compiler."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def cached(self, root=None):
        return sorted((root or self.cache / "approxdrop_lightning").glob("*"))


@pytest.fixture
def machine(tmp_path, library, monkeypatch):
    machine = Machine(tmp_path, library)
    for name, value in machine.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("APPROXDROP_NATIVE", raising=False)
    monkeypatch.setattr(native.tempfile, "tempdir", None)  # so that it is determined again
    return machine


def load():
    return native.library.__wrapped__()


def test_it_is_compiled_once_and_its_name_is_its_content(machine):
    assert load() is not None
    assert load() is not None
    (path,) = machine.cached()
    assert machine.compiled == 1
    assert path.name.endswith(f"-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.so")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_other_users_of_a_shared_cache_may_read_it(machine, umask):
    before = os.umask(umask)
    try:
        load()
    finally:
        os.umask(before)
    (path,) = machine.cached()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # access is controlled by the folder


DAMAGED = """
import sys
from pathlib import Path
from approxdrop_lightning.ops.native import library as native
path = Path(sys.argv[1])
whole = path.read_bytes()
for damage in (b"", whole[:4096], whole[: len(whole) // 2], whole[:-1], whole[:9000] + b"?" + whole[9001:], b"text"):
    path.unlink()  # what is mapped already must not change
    path.write_bytes(damage)
    loaded = native.library.__wrapped__()
    assert loaded is not None, len(damage)
    assert path.read_bytes() == whole, len(damage)
print("survived")
"""


def test_a_cached_library_that_is_damaged_is_compiled_anew(machine):
    """In a separate process, which a truncated library would kill."""
    load()
    (path,) = machine.cached()
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr
    assert machine.compiled == 7
    assert len(machine.cached()) == 1


def test_a_user_without_a_home(machine, monkeypatch):
    """Neither HOME nor an entry in passwd, as in a container with an arbitrary user ID."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(RuntimeError):
        Path.home()
    assert load() is not None
    assert load() is not None
    assert machine.compiled == 1
    folder = machine.tmp / f"approxdrop_lightning-{os.getuid()}"
    assert len(machine.cached(folder)) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("blocked", ["a file", "nowhere"])
def test_a_cache_that_cannot_be_written_to(machine, monkeypatch, blocked, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if blocked == "a file" else "/proc/nowhere")
    assert load() is not None
    assert load() is not None
    assert machine.compiled == 1


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_be_read_only(machine):
    (machine.cache / "approxdrop_lightning").mkdir(parents=True)
    (machine.cache / "approxdrop_lightning").chmod(0o555)
    assert load() is not None
    assert len(machine.cached(machine.tmp / f"approxdrop_lightning-{os.getuid()}")) == 1


@pytest.mark.parametrize("trap", ["link", "open to others"])
def test_nothing_is_run_from_a_temporary_folder_of_somebody_else(machine, monkeypatch, trap, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    folder = machine.tmp / f"approxdrop_lightning-{os.getuid()}"
    other = tmp_path / "theirs"
    other.mkdir()
    if trap == "link":
        folder.symlink_to(other)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    for calls in (1, 2):  # a private folder is used, so it is compiled each time
        assert load() is not None
        assert machine.compiled == calls
    assert not machine.cached(other) and not machine.cached(folder)
    assert list(machine.tmp.iterdir()) == [folder]  # which is removed


def test_messages_of_the_compiler_in_another_encoding(machine):
    machine.compiler(before="printf 'Warnung: \\344\\366\\374\\n' >&2; printf '\\377\\n'")
    assert load() is not None


BROKEN = {
    "fails, and says so in Latin-1": ("#!/bin/sh\nprintf 'ung\\374ltig\\n' >&2\nexit 1\n", "ung\ufffdltig"),
    "is killed": ("#!/bin/sh\nkill -9 $$\n", "failed"),
    "does not start": ("#!/nowhere/sh\n", "does not run"),
    "writes nothing": ("#!/bin/sh\nexit 0\n", "too short"),
    "writes something else": ("#!/bin/sh\nwhile [ $1 != -o ]; do shift; done; echo text > $2\n", "ELF|too short"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_compiler_that_is_broken_is_done_without(machine, what, caplog):
    script, message = BROKEN[what]
    machine.compiler(script=script.replace("{", "{{").replace("}", "}}"))
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert "the kernels of approxdrop_lightning were not compiled" in caplog.text
    assert any(part in caplog.text for part in message.split("|")), caplog.text
    assert not [path for root in (machine.cache, machine.tmp) for path in root.rglob(f"{native._PARTIAL}*")]


def test_a_compiler_that_takes_for_ever_is_not_waited_for_twice(machine, monkeypatch, caplog):
    machine.compiler(before="sleep 30")
    monkeypatch.setattr(native, "_LONGEST_COMPILATION", 0.3)
    began = time.monotonic()
    assert load() is None
    assert time.monotonic() - began < 10
    assert machine.compiled == 1
    assert "timed out" in caplog.text


def test_a_full_cache_does_not_keep_it_from_a_folder_with_space(machine):
    machine.compiler(before=f'case "$*" in *{machine.cache}*) echo No space left on device >&2; exit 1;; esac')
    assert load() is not None
    assert len(machine.cached(machine.tmp / f"approxdrop_lightning-{os.getuid()}")) == 1


def test_many_that_compile_at_once_all_get_it(machine):
    machine.compiler(before="sleep 0.2")
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda _: load(), range(8)))
    assert all(one is not None for one in loaded)
    assert machine.compiled > 1
    (path,) = machine.cached()  # and no partial file next to it
    assert path.suffix == ".so"


def test_what_a_killed_compilation_has_left_is_removed_later(machine):
    folder = machine.cache / "approxdrop_lightning"
    folder.mkdir(parents=True)
    old, new = folder / f"{native._PARTIAL}old.so", folder / f"{native._PARTIAL}new.so"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (time.time() - 1000,) * 2)
    load()
    assert new.exists() and not old.exists()
