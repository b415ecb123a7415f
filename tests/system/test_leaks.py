"""Containers come and go, and some of our processes are killed meanwhile: nothing may stay.

PYMIGRATE_LEAK_CYCLES sets the number of lives (30), PYMIGRATE_LEAK_KILLS that of the lives with a SIGKILL (10),
PYMIGRATE_LEAK_SEED the moments and victims of these.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.hosts import PYMIGRATE
from tests.leaks import leaks, left
from tests.system.conftest import Local

CYCLES = int(os.environ.get("PYMIGRATE_LEAK_CYCLES", "30"))
KILLS = int(os.environ.get("PYMIGRATE_LEAK_KILLS", "10"))
OWN = f"leaks-{os.getpid()}"
SEED = int(os.environ.get("PYMIGRATE_LEAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


@pytest.mark.timeout(60 + 3 * CYCLES)
def test_lives_leave_nothing(pymigrate: Local, bundle: Path) -> None:
    before = leaks(pymigrate.root, OWN)
    for number in range(CYCLES):
        name = f"{OWN}-{number}"
        pymigrate("create", "-b", bundle, name)
        pymigrate("start", name)
        pymigrate("delete", "--force", name)
    assert left(before, pymigrate.root, OWN) == []


@pytest.mark.timeout(60 + 15 * KILLS)
def test_what_a_kill_leaves_is_deleted(pymigrate: Local, bundle: Path) -> None:
    chance = random.Random(SEED)
    pymigrate("run", "-d", "-b", bundle, "web")  # the first one is slower: what is imported has to be compiled
    pymigrate("delete", "--force", "web")
    before = leaks(pymigrate.root, OWN)
    began = time.monotonic()
    pymigrate("run", "-d", "-b", bundle, "web")
    usual = time.monotonic() - began
    pymigrate("delete", "--force", "web")
    for number in range(KILLS):
        moment, kind = chance.uniform(0, 1.3 * usual), chance.choice(("cli", "monitor", "init"))
        name = f"{OWN}-{number}"
        happened = _run_and_kill(pymigrate.root, bundle, name, moment, kind)
        said = f"PYMIGRATE_LEAK_SEED={SEED}, life {number}: {happened} after {moment * 1000:.0f} ms"
        done = pymigrate("delete", "--force", name, check=False)
        assert (done.returncode, done.stderr) == (0, ""), said
        assert left(before, pymigrate.root, OWN) == [], said


def _run_and_kill(root: Path, bundle: Path, name: str, moment: float, kind: str) -> str:
    """Start a container and kill one of our processes after `moment` seconds; what was killed."""
    cli = subprocess.Popen(
        [*PYMIGRATE, "--root", str(root), "run", "-d", "-b", str(bundle), name],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with contextlib.suppress(subprocess.TimeoutExpired):
        cli.wait(moment)
    victims = {"cli": [cli.pid] if cli.poll() is None else [], "monitor": _monitors(root / name)}
    victims["init"] = [child for monitor in victims["monitor"] for child in _children(monitor)]
    for pid in victims[kind]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert cli.wait(60) in (0, 1, -signal.SIGKILL)
    return f"{kind} killed" if victims[kind] else f"{kind} not there"


def _monitors(directory: Path) -> list[int]:
    """The monitor of a container, whose arguments name its state directory (twice while it starts)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (process / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(directory) in argv and b"-S" in argv:
                found.append(int(process.name))
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
