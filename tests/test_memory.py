"""Freed memory is used again, without page faults."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from approxdrop_lightning import keep_freed_memory
    assert keep_freed_memory()
def use():
    parts = [torch.ones(4_000_000) for _ in range(4)]
use(), use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_no_page_faults_for_memory_that_was_used_before():
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, check=True, text=True).stdout
        )
        for mode in ("keep", "default")
    }
    # 64 MB ten times: at least 320 faults even with pages of 2 MB, if each use faults anew.
    assert faults["keep"] < 50
    assert faults["default"] > 200
