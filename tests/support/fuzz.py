"""Property tests: few inputs in the normal suite and many with ``pytest -m slow``; the inputs are counted.

``APPROXDROP_FUZZ=10`` tries ten times as many.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings

#: Number of inputs tested in this session, by test.
TRIED: Counter[str] = Counter()
#: Outcomes, where a test records them.
OUTCOMES: defaultdict[str, Counter[str]] = defaultdict(Counter)
FACTOR = float(os.environ.get("APPROXDROP_FUZZ", "1"))

# Few: always the same inputs, so that the suite does not fail by chance. Many: different ones each time.
_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", derandomize=True, **_COMMON)
settings.register_profile("many", print_blob=True, **_COMMON)


def current_test() -> str:
    """Name of the running test."""
    return os.environ["PYTEST_CURRENT_TEST"].split(" ")[0].removeprefix("tests/")


def came_of_it(what: str) -> None:
    """Count the outcome of an input."""
    OUTCOMES[current_test()][what] += 1


def examples(few: int, many: int):
    """Decorator for a test with an argument ``number``, the number of inputs; if ``few`` is 0 it is slow."""
    quick = [pytest.param(("few", few), id="few")] if few else []
    return pytest.mark.parametrize(
        "number", [*quick, pytest.param(("many", many), id="many", marks=pytest.mark.slow)]
    )


def fuzz(number: tuple[str, int], check: Callable[..., None], **strategies) -> None:
    """Call ``check`` with the given number of inputs."""
    profile, count = number
    name = current_test()

    def counted(**values):
        TRIED[name] += 1
        check(**values)

    profile = settings(settings.get_profile(profile), max_examples=max(1, int(count * FACTOR)))
    profile(given(**strategies)(counted))()
