"""Extension of mkdocstrings: docstrings as they are at run time, with code in place of Sphinx roles."""

import importlib
import inspect
import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Insert the texts that the package adds on import, and show ``:class:`.Report``` as ``Report``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Modify the docstring of an object."""
        if obj.docstring is None:
            return
        if "{options}" in obj.docstring.value:
            module = importlib.import_module(obj.module.path)
            obj.docstring.value = inspect.getdoc(getattr(module, obj.name)) or ""
        obj.docstring.value = re.sub(r":\w+:`[~.]*([^`]+)`", r"`\1`", obj.docstring.value)
