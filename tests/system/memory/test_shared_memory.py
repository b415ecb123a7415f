"""Moves of shared memory: it travels while the container runs, and in the freeze only what was written since."""

import json
from typing import Any

from tests.support.hosts import driver
from tests.system.conftest import Lab
from tests.workloads import bundle

KIND = "shared-memory-in-motion"
SIZE = 48 << 20  # bytes of its objects, three quarters of which are pages; a thirtieth may be written


def start(lab: Lab) -> None:
    """Run the program at host1."""
    bundle.start(lab, bundle.checkers(KIND))
    assert bundle.ready(lab, [KIND]) == [KIND]


def in_freeze(report: dict[str, Any]) -> int:
    """The bytes of memory that a move has sent in the freeze."""
    frozen: int = report["memory_sent"] - sum(done["bytes_sent"] for done in report["rounds"])
    return frozen


def test_every_word_is_right_and_most_bytes_travel_before_the_freeze(lab: Lab) -> None:
    start(lab)
    places = ["host1", "host2"]
    for number in range(2):  # the second time CRIU has made all of them, of memfds
        argv = ("--json", "move", "--compress", "none", "--mode", "pre-copy", "web", places[1])
        report = json.loads(lab.on(places[0], "pymigrate", *argv).stdout.splitlines()[-1])
        assert report["rounds"][0]["bytes_sent"] > SIZE * 7 // 10
        assert in_freeze(report) < SIZE // 2  # a child that was just forked goes whole: some 8 MiB
        places.reverse()
        assert bundle.check(lab, places[0], [KIND], number + 1) == {KIND: "ok"}


def test_it_outlives_a_move_that_rolls_back_and_one_that_is_recovered(lab: Lab) -> None:
    """The images at the target are as good as any, also on its disk."""
    start(lab)
    failing = driver("ask-restore", before="raise OSError('no restore')")
    assert lab.on("host1", lab.python, "-c", failing, check=False).returncode == 10
    assert bundle.check(lab, "host1", [KIND]) == {KIND: "ok"}
    killed = driver("end-source", after="os.kill(os.getpid(), 9)")
    assert lab.on("host1", lab.python, "-c", killed, check=False).returncode == 137
    lab.on("host1", "pymigrate", "recover", "web")
    assert bundle.check(lab, "host2", [KIND], 1) == {KIND: "ok"}
