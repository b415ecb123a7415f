"""Markers by directory; what a test needs that this machine lacks is said, not hidden."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(HERE).parts[0]
        item.add_marker(kind)
        if kind == "system" and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="system tests need root"))
