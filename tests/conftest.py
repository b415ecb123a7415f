"""Markers by directory; what a test needs that this machine lacks is said, not hidden."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

FAILED = pytest.StashKey[bool]()
HERE = Path(__file__).parent
VM_TIMEOUT = 1200  # seconds; the first test makes the machines, and without KVM they are slow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(HERE).parts[0]
        item.add_marker(kind)
        if kind in ("system", "vm") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason=f"{kind} tests need root"))
        if kind == "vm":
            item.add_marker(pytest.mark.timeout(VM_TIMEOUT))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note that a test has failed, for its fixtures: what it has left running is not known then."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report
