"""What pyproject.toml allows to be installed beside the package."""

import tomllib

import pytest
from packaging.requirements import Requirement
from support import ROOT

TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REQUIRED = {r.name: r.specifier for r in map(Requirement, tomllib.loads(TEXT)["project"]["dependencies"])}


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
