"""`--on-divergence throttle`: a program that writes too fast gets less processor time, until it has moved."""

import json
import time
from pathlib import Path

import pytest

from tests.support.pybox import write_python_bundle
from tests.system.conftest import Lab

# Computes for each page that it writes, so what it writes depends on its processor time; counts in its output.
WRITER = """
import mmap, time
pages = 4096
memory = mmap.mmap(-1, pages << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
number, last = 0, 0.0
while True:
    memory[number % pages << 12] = number % 251 + 1
    number += 1
    sum(range(1000))
    if time.monotonic() - last > 0.05:
        last = time.monotonic()
        print(number)
"""
# `move web host2` over a slow link. In the lab there is no other that slows down memory and not the freeze.
MOVER = """
import os, signal, sys, time
from migrate import faults
from migrate.cli import main
from migrate.wire.peer import Peer
send = Peer.send_memory
def slow(self, payload):
    time.sleep(sum(map(len, payload)) / (8 << 20))
    send(self, payload)
Peer.send_memory = slow
{more}
options = ["--compress", "none", "--on-divergence", "throttle", "--max-downtime", "{limit}"]
sys.exit(main(["--json", "move", *options, "web", "host2"]))
"""
QUOTA = (
    'cat $(sed -n \'s/.*"cpu": "\\([^"]*\\)".*/\\1/p\' /run/opencontainer/containers/web/state.json)/cpu.cfs_quota_us'
)
PATIENCE = 30.0  # seconds


@pytest.fixture
def quick(lab: Lab, tmp_path: Path) -> Lab:
    """host1 with a container that writes 16 MiB all the time. It has a limit of its own, of 0.9 processors."""
    if not Path("/sys/fs/cgroup/cpu").exists():
        pytest.skip("the quota is looked up in a cgroup of version 1")
    write_python_bundle(tmp_path / "web", WRITER)
    config = json.loads((tmp_path / "web/config.json").read_text())
    config["linux"].setdefault("resources", {})["cpu"] = {"quota": 90000, "period": 100000}
    (tmp_path / "web/config.json").write_text(json.dumps(config))
    for host in ("host1", "host2"):
        lab.put(host, tmp_path / "web", "/var/lib/pymigrate/test/web")
    lab.on("host1", "pymigrate", "run", "-d", "-b", "/var/lib/pymigrate/test/web", "web")
    lab.wait_count("host1", 5000)
    return lab


def is_left(lab: Lab, host: str) -> bool:
    return bool(lab.sh(host, "ls /run/opencontainer/containers/web/throttle.json", check=False))


def test_it_is_slowed_down_until_it_is_frozen(quick: Lab) -> None:
    more = f"""
def look(_):
    os.system(QUOTA + " >> /run/quotas")
QUOTA = {QUOTA!r}
faults.at("round", before=look)
faults.at("criu query-ext-files", before=look)
"""
    reached = quick.count("host1")
    done = quick.on("host1", quick.python, "-c", MOVER.format(more=more, limit=1.0))
    events = [json.loads(line) for line in done.stdout.splitlines()]
    steps = [event["percent"] for event in events if event["event"] == "throttle"]
    assert steps, events
    assert steps == [20, 30, 40, 50, 60, 70, 80, 90, 99][: len(steps)]
    quotas = list(map(int, quick.sh("host1", "cat /run/quotas").split()))
    assert quotas[:2] == [90000, 90000]
    assert 1000 <= quotas[-2] < 72001
    assert quotas[-1] == 90000, "the container's own limit holds while CRIU dumps it"
    assert events[-1]["workload"] == "TARGET"
    assert quick.sh("host2", QUOTA).strip() == "90000"
    assert not is_left(quick, "host2")
    quick.wait_count("host2", reached)


def test_nothing_stays_when_the_move_is_rolled_back(quick: Lab) -> None:
    more = f"""
def fail(number):
    if number == 4:
        os.system({QUOTA!r} + " > /run/quotas")
        raise OSError("no more")
faults.at("round", before=fail)
"""
    done = quick.on("host1", quick.python, "-c", MOVER.format(more=more, limit=0.2), check=False)
    assert done.returncode == 10, done.stdout
    assert int(quick.sh("host1", "cat /run/quotas")) < 90000
    assert quick.sh("host1", QUOTA).strip() == "90000"
    assert not is_left(quick, "host1")
    quick.wait_count("host1", quick.count("host1"))


def test_it_gets_its_own_limit_back_when_the_mover_is_killed(quick: Lab) -> None:
    more = f"""
def die(number):
    if number == 4:
        os.system({QUOTA!r} + " > /run/quotas")
        os.kill(os.getpid(), signal.SIGKILL)
faults.at("round", before=die)
"""
    done = quick.on("host1", quick.python, "-c", MOVER.format(more=more, limit=0.2), check=False)
    assert done.returncode == 137, done.stdout
    assert int(quick.sh("host1", "cat /run/quotas")) < 90000
    deadline = time.monotonic() + PATIENCE
    while is_left(quick, "host1"):
        assert time.monotonic() < deadline
    assert quick.sh("host1", QUOTA).strip() == "90000"
    quick.wait_count("host1", quick.count("host1"))
