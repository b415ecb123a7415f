"""Markers by directory, the draw of slow tests, and which tests must share a worker.

What a test needs that this machine lacks is said, not hidden.
"""

import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import draw, schedule

FAILED = pytest.StashKey[bool]()
HERE = Path(__file__).parent
VM_TIMEOUT = 1200  # seconds; the first test makes the machines, and without KVM they are slow


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--draw",
        action="store_true",
        help="leave out most tests between virtual machines, two thirds of the slow system tests and half of the cases "
        "of system tests that have many, by $PYMIGRATE_DRAW or else the commit's hash",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.relative_to(HERE).parts[0]
        item.add_marker(kind)
        if kind in ("system", "vm") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason=f"{kind} tests need root"))
        if kind == "vm":
            item.add_marker(pytest.mark.timeout(VM_TIMEOUT))
    if config.getoption("draw"):
        slow = {item.nodeid for item in items if item.get_closest_marker(draw.SLOW)}
        drawn = draw.drawn([item.nodeid for item in items], draw.seed(), slow)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in drawn])
        items[:] = [item for item in items if item.nodeid in drawn]
    items.sort(key=lambda item: schedule.turn(item.nodeid))


def _say_draw(config: pytest.Config, names: Sequence[str]) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not config.getoption("draw") or reporter is None:
        return
    seed = draw.seed()
    machines = [name for name in names if name.startswith(draw.MACHINES)]
    by = "by a fixed seed, as there is no commit here" if seed == draw.WITHOUT_GIT else f"by {seed}"
    reporter.write_line(
        f"draw: {len(machines)} tests between virtual machines, a third of the slow system tests, and half of the "
        f"cases where a system test has {draw.MANY} or more, {by}; `make test-all` runs all"
    )
    for name in machines:
        reporter.write_line(f"draw: {name}")
    reporter.write_line(f"draw: the same once more: PYMIGRATE_DRAW={seed} make test")


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.items:  # workers of pytest-xdist have no terminal, and the session that they have does not collect
        _say_draw(session.config, [item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    if node.gateway.id == "gw0":
        _say_draw(node.config, ids)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    return schedule.scheduler(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note that a test has failed, for its fixtures: what it has left running is not known then."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report
