"""Moves of shared memory: it travels while the container runs, and in the freeze only what was written since."""

import json
from typing import Any

from tests.system.conftest import Lab
from tests.workloads import bundle

KIND = "shared-memory-in-motion"
SIZE = 19 << 20  # bytes of its objects, three quarters of which are pages; a thirtieth may be written
ALLOW = ("--allow", "seccomp")


def in_freeze(report: dict[str, Any]) -> int:
    """The bytes of memory that a move has sent in the freeze."""
    frozen: int = report["memory_sent"] - sum(done["bytes_sent"] for done in report["rounds"])
    return frozen


def move(lab: Lab, source: str, target: str, *options: str) -> dict[str, Any]:
    """Move the container and return the report."""
    argv = ("--json", "move", *ALLOW, "--compress", "none", *options, "web", target)
    report: dict[str, Any] = json.loads(lab.on(source, "pymigrate", *argv).stdout.splitlines()[-1])
    return report


def test_every_word_is_right_and_most_bytes_travel_before_the_freeze(lab: Lab) -> None:
    bundle.start(lab, bundle.checkers(KIND))
    assert bundle.ready(lab, [KIND]) == [KIND]
    places = ["host1", "host2"]
    for number in range(2):  # the second time CRIU has made all of them, of memfds
        report = move(lab, *places, "--mode", "pre-copy")
        assert report["rounds"][0]["bytes_sent"] > SIZE * 7 // 10
        assert in_freeze(report) < SIZE // 2
        places.reverse()
        assert bundle.check(lab, places[0], [KIND], number + 1) == {KIND: "ok"}
