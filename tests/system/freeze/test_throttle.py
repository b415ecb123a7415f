"""A container gets less processor time for a while, and always its own limit back."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.cgroups.quota import Quota
from runtime.freeze import mend, throttle
from runtime.freeze.throttle import Throttle
from runtime.linux import processes
from runtime.state.record import State
from runtime.state.store import Store
from tests.support.boxes import make
from tests.system.conftest import Local

BUSY = "while :; do :; done"
PATIENCE = 30.0  # seconds
# Throttles the container "c", says so, and waits to be killed.
THROTTLER = """
import signal, sys
from runtime.freeze.throttle import Throttle
from runtime.state.store import Store
store = Store(sys.argv[1])
with store.lock("c"):
    throttle = Throttle(store.load("c"))
    throttle.tighten()
    print(throttle._watcher, flush=True)
    signal.pause()
"""


def start(pymigrate: Local, tmp_path: Path, **fields: object) -> State:
    bundle = make(tmp_path / "bundle", BUSY, fields)
    pymigrate("run", "-d", "-b", bundle, "c")
    return Store(pymigrate.root).load("c")


def quota(state: State) -> Quota:
    return Quota.of(state.cgroup_paths)


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def killed(pymigrate: Local, tmp_path: Path, request: pytest.FixtureRequest) -> State:
    """A container that was left throttled: its throttler was killed, and first the watcher if the test says so."""
    state = start(pymigrate, tmp_path)
    process = subprocess.Popen([sys.executable, "-c", THROTTLER, pymigrate.root], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        watcher = int(process.stdout.readline())
        assert quota(state).processors is not None
        if request.param:
            os.kill(watcher, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)
    return state


def test_each_step_leaves_less_and_the_end_gives_everything_back(pymigrate: Local, tmp_path: Path) -> None:
    state = start(pymigrate, tmp_path)
    own, children = quota(state), processes.children(os.getpid(), processes.start_time(os.getpid()))
    assert own.processors is None
    seen = []
    slowed = Throttle(state)
    time.sleep(0.3)  # how much it uses
    try:
        while slowed.tighten():
            seen.append((slowed.percent, quota(state).processors))
        assert throttle.is_left(state)
    finally:
        slowed.close()
    assert [percent for percent, _ in seen] == [20, 30, 40, 50, 60, 70, 80, 90, 99]
    shares = [share for _, share in seen if share is not None]
    assert len(shares) == 9
    assert shares == sorted(shares, reverse=True)
    assert shares[0] <= 0.9  # of one processor: a busy shell
    assert shares[-1] <= 0.011
    assert (quota(state), throttle.is_left(state)) == (own, False)
    assert processes.children(os.getpid(), processes.start_time(os.getpid())) <= children


def test_its_own_limit_is_not_exceeded_and_comes_back(pymigrate: Local, tmp_path: Path) -> None:
    limits = {"linux.resources.cpu": {"quota": 20000, "period": 50000}}
    state = start(pymigrate, tmp_path, **limits)
    own = quota(state)
    assert own.processors == 0.4
    slowed = Throttle(state)
    time.sleep(0.3)
    try:
        assert slowed.tighten()
        assert 0.02 <= (quota(state).processors or 0) <= 0.8 * 0.4 + 0.001
        slowed.lift()
        assert quota(state) == own
    finally:
        slowed.close()


@pytest.mark.parametrize("killed", [False], indirect=True)
def test_a_watcher_acts_when_the_throttler_is_killed(killed: State) -> None:
    until(lambda: not throttle.is_left(killed))
    assert quota(killed).processors is None


@pytest.mark.parametrize("killed", [True], indirect=True)
@pytest.mark.parametrize("verb", ["resume", "update", "recover", "move"])
def test_the_next_verb_acts_when_both_are_killed(pymigrate: Local, killed: State, verb: str) -> None:
    assert throttle.is_left(killed)
    if verb == "move":
        with Store(pymigrate.root).lock("c"):
            mend.repair_left(killed)
    elif verb == "update":
        pymigrate("update", "--cpu-quota", "70000", "c")
    else:
        pymigrate(verb, "c", check=False)  # there is nothing else to do
    assert not throttle.is_left(killed)
    assert quota(killed).processors == (0.7 if verb == "update" else None)


@pytest.mark.parametrize("killed", [True], indirect=True)
def test_a_container_that_was_left_throttled_can_be_deleted(pymigrate: Local, killed: State) -> None:
    pymigrate("delete", "--force", "c")
    assert not Path(killed.directory).exists()
