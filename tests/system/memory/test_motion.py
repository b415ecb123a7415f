"""Moves of memory that is mapped, unmapped, moved, discarded, forked and left by execve(2) all the time."""

import json
from typing import Any

import pytest

from tests.support.hosts import in_agent, verb
from tests.system.conftest import Lab
from tests.workloads import bundle

KIND = "memory-in-motion"
ALLOW = ("--allow", "seccomp")


def move(lab: Lab, source: str, target: str, *options: str) -> dict[str, Any]:
    """Move the container and return the report."""
    done = lab.on(source, "pymigrate", "--json", "move", *ALLOW, *options, "web", target)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["event"] == "report"
    return report


@pytest.mark.parametrize("mode", ["pre-copy", "stop-and-copy"])
def test_every_page_is_what_was_written_last(lab: Lab, mode: str) -> None:
    bundle.start(lab, bundle.checkers(KIND))
    assert bundle.ready(lab, [KIND]) == [KIND]
    places = ["host1", "host2"]
    for number in range(4 if mode == "pre-copy" else 1):
        source, target = places
        assert move(lab, source, target, "--mode", mode)["mode"] == mode
        assert bundle.check(lab, target, [KIND], number + 1) == {KIND: "ok"}
        places.reverse()


def test_a_target_without_userfaultfd_restores_when_all_memory_is_there(lab: Lab) -> None:
    bundle.start(lab, bundle.checkers(KIND))
    assert bundle.ready(lab, [KIND]) == [KIND]
    without = in_agent("from migrate.memory import lazy_support\nlazy_support.problem = lambda: 'userfaultfd is off'")
    done = lab.on("host1", lab.python, "-c", without + verb("--json", "move", *ALLOW, "web", "host2"))
    events = [json.loads(line) for line in done.stdout.splitlines()]
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert "web is resumed when all memory is in place: userfaultfd is off" in warnings
    assert events[-1]["mode"] == "pre-copy"
    assert bundle.check(lab, "host2", [KIND]) == {KIND: "ok"}
