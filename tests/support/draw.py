"""The draw of `make test`, by the commit's hash.

Of the tests between virtual machines it takes a move and a few others. Of the system tests it takes half of the cases
of each that has many, and a third of those that are marked as slow. Every other test runs.

The draw is the same whenever the seed is, and hardly changes when tests come or go: the place of a test in the queue
depends on the seed and on its own name only.
"""

import hashlib
import os
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path

MACHINES = "tests/vm/"
SLOW = "slow"  # the marker of system tests that take more than about 5 s
ALWAYS = ("tests/vm/test_images.py::", "tests/vm/test_move.py::test_a_bare_target_can_look_after_what_comes")
NUMBER = 1  # of tests between the machines, beside ALWAYS
MANY = 4  # cases of a system test
WITHOUT_GIT = "no-commit"
_TOP = Path(__file__).resolve().parents[2]


def seed() -> str:
    """Return $PYMIGRATE_DRAW, or the hash of the commit that is checked out, or WITHOUT_GIT outside of a clone."""
    chosen = os.environ.get("PYMIGRATE_DRAW")
    if chosen:
        return chosen
    # Git refuses the clone of another user unless it is told not to.
    command = ["git", "-c", f"safe.directory={_TOP}", "-C", str(_TOP), "rev-parse", "--verify", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return WITHOUT_GIT


def drawn(names: Iterable[str], by: str, slow: Collection[str] = ()) -> set[str]:
    """Return the node ids, of `names`, that run for the seed `by`; `slow` are those of slow system tests."""
    queues: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: hashlib.sha256(f"{by}\0{name}".encode()).digest()):
        queues.setdefault(SLOW if name in slow else _queue(name), []).append(name)
    return {name for queue, waiting in queues.items() for name in waiting[: _number(queue, len(waiting))]}


def _queue(name: str) -> str:
    """Return what a test shares with those that may run in its place."""
    if name.startswith(MACHINES):
        return name if name.startswith(ALWAYS) else MACHINES
    return name.partition("[")[0] if name.startswith("tests/system/") else name


def _number(queue: str, waiting: int) -> int:
    if queue == MACHINES:
        return NUMBER
    if queue == SLOW:
        return (waiting + 2) // 3
    return waiting if waiting < MANY else (waiting + 1) // 2
