"""Containers come and go, and some of our processes are killed meanwhile: nothing may stay.

In each way to have one: detached, with a monitor; in the foreground; and for an engine, which is a subreaper and so the
monitor of its containers itself. Some of them have a network of their own on a bridge.

PYMIGRATE_LEAK_CYCLES sets the number of lives (30), PYMIGRATE_LEAK_KILLS that of the lives with a SIGKILL (15),
PYMIGRATE_LEAK_SEED the moments and victims of these.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import PYMIGRATE, write_bundle
from tests.support.leaks import BRIDGE, leaks, left, own_network
from tests.system.conftest import Local

CYCLES = int(os.environ.get("PYMIGRATE_LEAK_CYCLES", "30"))
KILLS = int(os.environ.get("PYMIGRATE_LEAK_KILLS", "15"))
OWN = f"leaks-{os.getpid()}"
SEED = int(os.environ.get("PYMIGRATE_LEAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
WAYS = ("detached", "foreground", "engine")
# An engine (36 is PR_SET_CHILD_SUBREAPER): creates and starts a container, and reaps what is left to it until the end.
ENGINE = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
bundle, name, net, *command = sys.argv[1:]
if subprocess.call([*command, "create", "-b", bundle, *net.split(), name]) == 0:
    subprocess.call([*command, "start", name])
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""


@pytest.fixture(params=["", "bridge"])
def net(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Without a network and with one on a bridge: options of `create` and `run`."""
    if not request.param:
        yield []
        return
    with own_network():
        yield ["--net", f"bridge={BRIDGE},ip=10.99.0.5/24,ip=fd99::5/64"]


def begin(way: str, root: Path, bundle: Path, name: str, net: list[str]) -> "subprocess.Popen[bytes]":
    """The process that starts a container in one of the three ways; only a detached one lets it end soon."""
    command = [*PYMIGRATE, "--root", str(root)]
    argv = {
        "detached": [*command, "run", "-d", "-b", str(bundle), *net, name],
        "foreground": [*command, "run", "-b", str(bundle), *net, name],
        "engine": [sys.executable, "-c", ENGINE, str(bundle), name, " ".join(net), *command],
    }[way]
    return subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip


@pytest.mark.timeout(60 + 3 * CYCLES)
def test_lives_leave_nothing(pymigrate: Local, bundle: Path, tmp_path: Path, net: list[str]) -> None:
    write_bundle(tmp_path / "short", "true")
    before = leaks(pymigrate.root, OWN)
    for number in range(CYCLES // 3 if net else CYCLES):
        name = f"{OWN}-{number}"
        way = WAYS[number % len(WAYS)]
        if way == "detached":
            pymigrate("create", "-b", bundle, *net, name)
            pymigrate("start", name)
            pymigrate("delete", "--force", name)
        else:
            starter = begin(way, pymigrate.root, tmp_path / "short", name, net)
            assert starter.wait(60) == 0
            if way == "engine":
                pymigrate("delete", name)
    assert left(before, pymigrate.root, OWN) == []


@pytest.mark.timeout(60 + 15 * KILLS)
def test_what_a_kill_leaves_is_deleted(pymigrate: Local, bundle: Path, net: list[str]) -> None:
    chance = random.Random(SEED)
    pymigrate("run", "-d", "-b", bundle, *net, "web")  # the first one is slower: what is imported has to be compiled
    pymigrate("delete", "--force", "web")
    before = leaks(pymigrate.root, OWN)
    began = time.monotonic()
    pymigrate("run", "-d", "-b", bundle, *net, "web")
    usual = time.monotonic() - began
    pymigrate("delete", "--force", "web")
    for number in range(KILLS // 3 if net else KILLS):
        way, name = WAYS[number % len(WAYS)], f"{OWN}-{number}-"
        moment = chance.uniform(0, (2.5 if way == "engine" else 1.5) * usual)
        starter = begin(way, pymigrate.root, bundle, name, net)
        with contextlib.suppress(subprocess.TimeoutExpired):
            starter.wait(moment)
        # In the order of pids, so that the seed says who it is.
        victims = [(pid, who) for pid, who in sorted(processes_of(name)) if way != "engine" or pid != starter.pid]
        pid, who = chance.choice(victims) if victims else (0, "nobody")
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if way == "detached":
            starter.wait(60)
        said = f"PYMIGRATE_LEAK_SEED={SEED}, life {number}, {way}: {who} killed after {moment * 1000:.0f} ms"
        try:
            # Whoever is still about to create it has it deleted as well.
            while True:
                done = pymigrate("delete", "--force", name, check=False)
                assert (done.returncode, done.stderr) == (0, ""), said
                with contextlib.suppress(subprocess.TimeoutExpired):
                    starter.wait(0.2)
                    break
            done = pymigrate("delete", "--force", name, check=False)
            assert (done.returncode, done.stderr) == (0, ""), said
        finally:
            starter.kill()
            starter.wait()
        assert left(before, pymigrate.root, OWN) == [], said


def processes_of(name: str) -> list[tuple[int, str]]:
    """The processes of a container and of those who start it: whoever has its name as argument or is in its cgroup."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            argv = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if name in argv or name in (process / "cgroup").read_text():
                found.append((int(process.name), argv[-120:]))
    return found
