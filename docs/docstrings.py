"""What mkdocstrings reads of a docstring: as Python has it at run time, with code in the place of Sphinx's roles."""

import importlib
import inspect
import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Fill in what the package fills in when it is imported, and show ``:class:`.Report``` as ``Report``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of anything that has one."""
        if obj.docstring is None:
            return
        if "{options}" in obj.docstring.value:
            module = importlib.import_module(obj.module.path)
            obj.docstring.value = inspect.getdoc(getattr(module, obj.name)) or ""
        obj.docstring.value = re.sub(r":\w+:`[~.]*([^`]+)`", r"`\1`", obj.docstring.value)
