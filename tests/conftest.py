"""Markers by directory; what a test needs that this machine lacks is said, not hidden."""

import os
from pathlib import Path

import pytest

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
