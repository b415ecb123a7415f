"""The draw of `make test`: of the tests between virtual machines only a move and a few others, by the commit's hash.

The draw is the same whenever the seed is, and hardly changes when tests come or go: the place of a test in the queue
depends on the seed and on its own name only.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

ALWAYS = ("tests/vm/test_images.py::", "tests/vm/test_move.py::test_a_bare_target_can_look_after_what_comes")
NUMBER = 3  # of tests between the machines, beside ALWAYS
WITHOUT_GIT = "no-commit"
_TOP = Path(__file__).resolve().parent.parent


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


def drawn(names: Iterable[str], by: str) -> set[str]:
    """Return the node ids, of `names`, that run for the seed `by`."""
    queue = sorted(names, key=lambda name: hashlib.sha256(f"{by}\0{name}".encode()).digest())
    always = [name for name in queue if name.startswith(ALWAYS)]
    return {*always, *[name for name in queue if name not in always][:NUMBER]}
