"""The lab: hosts that reach each other by ssh, and that leave nothing behind, whatever ended them."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import PYMIGRATE
from tests.system.conftest import Lab


@pytest.fixture
def own_lab() -> Iterator[Lab]:
    lab = Lab(f"own-{os.getpid()}")
    yield lab
    lab.lab("down")
    assert remains(lab) == []


def remains(lab: Lab) -> list[str]:
    # Not rglob, which fails where another test removes a cgroup meanwhile.
    cgroups = [f"{top}/{name}" for top, names, _ in os.walk("/sys/fs/cgroup") for name in names]
    found = [path for path in cgroups if os.path.basename(path).startswith(f"pymigrate-lab-{lab.name}")]
    place = Path("/run/pymigrate/lab", lab.name)
    found += [str(place)] if place.exists() else []
    return found + [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if lab.name in line]


def test_hosts_are_apart_and_reach_each_other(lab: Lab) -> None:
    assert lab.on("host1", "hostname").stdout == "host1\n"
    assert lab.on("host1", "ssh", "-o", "BatchMode=yes", "host2", "hostname").stdout == "host2\n"
    lab.sh("host1", "echo x > /run/mine; echo y > /var/lib/pymigrate/mine")
    assert lab.sh("host2", "ls /run /var/lib/pymigrate | grep mine", check=False) == ""
    assert not Path("/run/mine").exists()


def test_commands_in_a_host(lab: Lab) -> None:
    assert lab.lab("exec", "host2", "--", "hostname").stdout == "host2\n"
    shown = lab.lab("exec", "host1", "--", "sh", "-c", "echo $PYMIGRATE_LAB $HOME; command -v pymigrate").stdout
    assert shown.split() == [lab.name, "/root", lab.environment["PATH"].partition(":")[0] + "/pymigrate"]
    assert lab.lab("exec", "host1", "sh", "-c", "exit 5", check=False).returncode == 5
    assert lab.lab("exec", "host1", "--", "sh", "-c", "kill -9 $$", check=False).returncode == 137
    assert lab.lab("exec", "host1", "--", "no-such-program", check=False).returncode == 127


def test_ssh_from_this_machine(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "config").write_text(lab.lab("ssh-config").stdout)
    done = subprocess.run(
        ["ssh", "-F", tmp_path / "config", "-o", "BatchMode=yes", "host2", "hostname"],
        capture_output=True, text=True, timeout=30, env=lab.environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stdout == "host2\n", done.stderr


def test_up_twice_is_refused(lab: Lab) -> None:
    done = lab.lab("up", check=False)
    assert (done.returncode, "is up already" in done.stderr) == (1, True)


def test_unknown_host(lab: Lab) -> None:
    done = lab.lab("exec", "host9", "--", "true", check=False)
    assert (done.returncode, "host host9 does not exist in the lab" in done.stderr) == (4, True)


def test_down_ends_containers_too(own_lab: Lab) -> None:
    own_lab.lab("up", "-n", "1")
    own_lab.run()
    own_lab.wait_count("host1", 1)


@pytest.mark.parametrize("victim", ["host", "all"])
def test_down_after_a_crash(own_lab: Lab, victim: str) -> None:
    own_lab.lab("up")
    pids = [int(line.split()[2]) for line in own_lab.lab("status").stdout.splitlines()[1:]]
    for pid in pids if victim == "all" else pids[:1]:
        os.kill(pid, signal.SIGKILL)
    own_lab.lab("down")
    assert remains(own_lab) == []
    own_lab.lab("up", "-n", "1")


def test_up_that_is_killed_leaves_nothing_after_down(own_lab: Lab) -> None:
    process = subprocess.Popen([*PYMIGRATE, "lab", "up"], env=own_lab.environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(Path("/run/pymigrate/lab", own_lab.name).glob("host1/pid")):
        pass
    process.kill()
    process.wait()


def test_each_host_has_been_up_for_another_time(lab: Lab) -> None:
    """So that a clock that jumps in a move is seen."""
    first, second = (float(lab.on(host, "cat", "/proc/uptime").stdout.split()[0]) for host in ("host1", "host2"))
    assert second - first > 90_000
