"""A thread that sleeps in the kernel and cannot be frozen is found before anything is frozen."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.freeze import unfreezable
from tests.support.pybox import write_python_bundle
from tests.system.conftest import Local

# The child of a vfork waits for a writer of the fifo, and the parent for the child; another process of it counts.
PROGRAM = """
import os, time
os.mkfifo("/tmp/fifo")
if os.fork() == 0:
    while True:
        print("alive", flush=True)
        time.sleep(0.05)
os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 3, "/tmp/fifo", os.O_RDONLY, 0)])
print("released", flush=True)
os.wait()
time.sleep(1000)
"""


@pytest.fixture
def waiting(pymigrate: Local, tmp_path: Path) -> dict[str, Any]:
    """The container c, whose first process waits for its child; its state."""
    write_python_bundle(tmp_path / "b", PROGRAM)
    pymigrate("run", "-d", "-b", tmp_path / "b", "c")
    state = pymigrate.state("c")
    deadline = time.monotonic() + 15
    while not unfreezable.find(state["pid"], 0.0):
        assert time.monotonic() < deadline
    return state


def wait_for_line(pymigrate: Local, line: str, beyond: int = 0) -> int:
    """Wait until the container has written the line more often than that; how often it has."""
    deadline = time.monotonic() + 15
    while (found := pymigrate("logs", "c").stdout.splitlines().count(line)) <= beyond:
        assert time.monotonic() < deadline
    return found


def test_it_is_named_and_nothing_is_frozen(pymigrate: Local, waiting: dict[str, Any], tmp_path: Path) -> None:
    found = json.loads(pymigrate("--json", "validate", "c", check=False).stdout)["blockers"]
    assert [blocker["rule"] for blocker in found] == ["unfreezable"]
    who = f"process {waiting['pid']} (python3; 1 inside the container)"
    assert found[0]["where"] == who
    assert "its child: process " in found[0]["problem"]
    for verb in (
        ("checkpoint", "--image-path", tmp_path / "images", "--work-path", tmp_path / "work", "c"),
        ("snapshot", "save", "c", tmp_path / "snapshot"),
    ):
        done = pymigrate(*verb, check=False)
        assert (done.returncode != 0, who in done.stderr, "vfork" in done.stderr) == (True, True, True), done.stderr
        assert "criu" not in done.stderr
        assert not (tmp_path / "images" / "inventory.img").exists()
    wait_for_line(pymigrate, "alive", wait_for_line(pymigrate, "alive"))
    pymigrate("exec", "c", "sh", "-c", ": > /tmp/fifo")
    wait_for_line(pymigrate, "released")
    pymigrate("checkpoint", "--image-path", tmp_path / "images", "--work-path", tmp_path / "work", "c")


def test_criu_gives_up_soon(waiting: dict[str, Any]) -> None:
    assert unfreezable.seize_timeout(waiting["pid"]) == 3
