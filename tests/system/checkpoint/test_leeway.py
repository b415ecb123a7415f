"""CRIU works in the container's cgroup at a restore: limits must neither stop nor slow it, and hold from the start."""

import json
import time
from pathlib import Path

import pytest

from runtime.cgroups.leeway import Leeway
from runtime.errors import ContainerError
from runtime.linux.files import read
from tests.support.boxes import make
from tests.support.hosts import driver
from tests.system.conftest import Lab, Local

# Six processes; whether a seventh can be made is written whenever the answer is another one.
FULL = (
    "for i in 1 2 3 4 5; do sleep 1000 & done; "
    "i=0; while :; do i=$((i+1)); echo $i; for j in 1 2 3 4 5 6 7 8 9 0; do read -t 0.01 x < /tmp/fifo; done; done"
)
MEMORY = 16 << 20  # more than CRIU itself uses: a limit that only CRIU exceeds waits for the end of CRIU
LIMITS = {"pids": {"limit": 6}, "cpu": {"quota": 4000, "period": 100000}, "memory": {"limit": MEMORY}}
WANTED = ["6", "4000", str(MEMORY)]
FILES = {"pids": "pids.max", "cpu": "cpu.cfs_quota_us", "memory": "memory.limit_in_bytes"}
UNIFIED = ("pids.max", "cpu.max", "memory.max")
SCRIPT = "mkfifo /tmp/fifo; exec 3<> /tmp/fifo; " + FULL


def files(paths: dict[str, str]) -> list[str]:
    """Where the limits are, whatever version the cgroups have."""
    if "memory" in paths:
        return [f"{paths[controller]}/{name}" for controller, name in FILES.items()]
    return [f"{paths['']}/{name}" for name in UNIFIED]


def limits(pymigrate: Local, container: str) -> list[str]:
    return [read(path).split()[0] for path in files(pymigrate.state(container)["cgroup_paths"])]


def wait_beyond(pymigrate: Local, container: str, number: int) -> int:
    deadline = time.monotonic() + 15
    while (last := int(pymigrate("logs", "--tail", "1", container).stdout.strip() or 0)) <= number:
        assert time.monotonic() < deadline
    return last


def test_a_container_at_its_limits_comes_back(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", SCRIPT, {"linux.resources": LIMITS, "root.readonly": True})
    pymigrate("run", "-d", "-b", bundle, "c")
    before = wait_beyond(pymigrate, "c", 0)
    assert limits(pymigrate, "c") == WANTED
    images = ("--image-path", tmp_path / "images", "--work-path", tmp_path / "work")
    pymigrate("checkpoint", *images, "c")
    started = time.monotonic()
    pymigrate("restore", "-d", "-b", bundle, *images, "c")
    assert time.monotonic() - started < 5  # at the speed that the quota allows it takes 3 s and more of computing alone
    assert limits(pymigrate, "c") == WANTED
    before = wait_beyond(pymigrate, "c", before)
    pymigrate("snapshot", "save", "--stop", "c", tmp_path / "snapshot")
    pymigrate("delete", "-f", "c", check=False)
    pymigrate("snapshot", "restore", tmp_path / "snapshot", "--id", "d")
    assert limits(pymigrate, "d") == WANTED
    wait_beyond(pymigrate, "d", before)


def test_the_limits_hold_before_the_first_instruction(lab: Lab) -> None:
    """Also those of `update`: seen at the target when the source has not given the container up yet."""
    lab.run(script=SCRIPT)
    before = lab.wait_count("host1", 1)
    lab.on("host1", "pymigrate", "update", "--pids-limit", "6", "--cpu-quota", "4000", "--memory", str(MEMORY), "web")
    places = " ".join(files(lab.state("host1")["cgroup_paths"]))
    look = f"subprocess.run(['ssh', 'host2', 'cat {places} > /run/seen'], check=True, stdin=subprocess.DEVNULL)"
    program = driver("hand-over", before=look)
    done = lab.on("host1", lab.python, "-c", program, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert [line.split()[0] for line in lab.sh("host2", "cat /run/seen").splitlines()] == WANTED
    lab.wait_count("host2", before)
    assert json.loads(done.stdout.splitlines()[-1])["workload"] == "TARGET"


def test_memory_that_does_not_fit_is_no_surprise_later(pymigrate: Local, tmp_path: Path) -> None:
    """Where swap is missing, say: nothing of the container may be killed for it once it runs."""
    script = "mkfifo /tmp/go; read x < /tmp/go; head -c 50000000 /dev/zero > /tmp/big; echo 1; sleep 1000"
    bundle = make(tmp_path / "b", script, {"linux.resources": LIMITS, "root.readonly": True})
    pymigrate("run", "-d", "-b", bundle, "c")
    leeway = Leeway()
    leeway.lift(pymigrate.state("c")["cgroup_paths"])
    pymigrate("exec", "c", "sh", "-c", "while ! [ -p /tmp/go ]; do sleep 0.01; done; echo > /tmp/go")
    wait_beyond(pymigrate, "c", 0)
    with pytest.raises(ContainerError, match="does not fit into its limit of 16384 KiB"):
        leeway.end()
