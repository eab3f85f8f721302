"""Test helpers: models, cases and paths."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PROGRAMS = TESTS / "support" / "programs"


def compiler_environment():
    """Environment of a subprocess that compiles kernels, for which the interpreter must be off."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
