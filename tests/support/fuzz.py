"""Properties are tried on few inputs in the normal suite and on many with ``pytest -m slow``; how many is counted.

``APPROXDROP_FUZZ=10`` tries ten times as many.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings

#: Inputs tried in this session, by test.
TRIED: Counter[str] = Counter()
#: What came of them, where a test says so.
OUTCOMES: defaultdict[str, Counter[str]] = defaultdict(Counter)
FACTOR = float(os.environ.get("APPROXDROP_FUZZ", "1"))

# Few: the same ones each time, so that the suite does not fail by chance. Many: others each time.
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", derandomize=True, **_COMMON)
settings.register_profile("many", print_blob=True, **_COMMON)


def current_test() -> str:
    """Of the test that is running."""
    return os.environ["PYTEST_CURRENT_TEST"].split(" ")[0].removeprefix("tests/")


def came_of_it(what: str) -> None:
    """Count what came of an input."""
    OUTCOMES[current_test()][what] += 1


def examples(few: int, many: int):
    """Decorator of a test that takes ``number``: how many inputs to try; with ``few`` 0 it is slow."""
    quick = [pytest.param(("few", few), id="few")] if few else []
    return pytest.mark.parametrize(
        "number", [*quick, pytest.param(("many", many), id="many", marks=pytest.mark.slow)]
    )


def fuzz(number: tuple[str, int], check: Callable[..., None], **strategies) -> None:
    """Call ``check`` with so many inputs."""
    profile, count = number
    name = current_test()

    def counted(**values):
        TRIED[name] += 1
        check(**values)

    profile = settings(settings.get_profile(profile), max_examples=max(1, int(count * FACTOR)))
    profile(given(**strategies)(counted))()
