"""What a tracker reports of a program that maps, moves, empties and unmaps its memory all the time is enough."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.memory import soft_dirty, write_protection
from tests.support import mirror
from tests.system.memory.lazy_restore import compiled

SUPPORT = {"userfaultfd": write_protection.support, "soft-dirty": soft_dirty.support}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", SUPPORT)
def test_nothing_is_missed(kind: str, seed: int, tmp_path: Path) -> None:
    """And the program does not notice: with mappings that were registered in part its mremap(2) failed."""
    if problem := SUPPORT[kind]():
        pytest.skip(problem)
    program = compiled("restless", tmp_path)
    argv = [sys.executable, mirror.__file__, program, kind, *map(str, (seed, 32, 3, 12))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pages"] > 100
    assert found["wrong"] == []
