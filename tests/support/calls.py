"""How much Python of the package runs."""

import sys
from contextlib import contextmanager
from pathlib import Path

import approxdrop_lightning

_FOLDER = str(Path(approxdrop_lightning.__file__).parent)


@contextmanager
def calls_into_package():
    """Collect the functions of the package that are called, as ``"file.py:function"``."""
    found = []

    def profile(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_FOLDER):
            found.append(f"{Path(code.co_filename).name}:{code.co_name}")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(before)
