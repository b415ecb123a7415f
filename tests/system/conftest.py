"""Real containers on this machine, and a lab of two hosts with a real sshd each."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.lab import model
from runtime.linux import selfexec
from tests.conftest import FAILED
from tests.support.hosts import COUNT, PYMIGRATE, ROOTFS, Hosts, write_bundle

# Most tests leave no container at one of the hosts: the command line need not start there.
_CLEAN = """
if [ -n "$(ls -A /run/opencontainer/containers 2> /dev/null)" ]; then
    for i in $(pymigrate list -q 2> /dev/null); do pymigrate delete -f $i; done
fi
rm -rf /run/pymigrate/images/memory/*
umount -l /run/pymigrate/images/memory /run/pymigrate/images 2> /dev/null
umount -l /var/lib/pymigrate/tmpfs/*/* 2> /dev/null
rm -rf /run/pymigrate/images /var/lib/pymigrate/* /run/opencontainer
"""
# The shell would add its own variables to the environment.
_ENTER = 'unset PWD OLDPWD && exec nsenter --target "$0" --mount --uts --ipc --net --cgroup --pid --time -- "$@"'


@pytest.fixture(scope="session", autouse=True)
def provisioned() -> None:
    if not ROOTFS.is_dir():
        pytest.exit(f"{ROOTFS} is missing: run `make setup`", returncode=1)


@dataclasses.dataclass
class Local:
    """pymigrate on this machine with a root directory of the test's own."""

    root: Path

    def argv(self, *argv: object) -> list[str]:
        return [*PYMIGRATE, "--root", str(self.root), *map(str, argv)]

    def __call__(self, *argv: object, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            self.argv(*argv),
            capture_output=True, text=True, timeout=120, **{"stdin": subprocess.DEVNULL, **options},
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    def state(self, container: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.root / container / "state.json").read_text())
        return value


@pytest.fixture
def pymigrate(tmp_path: Path) -> Iterator[Local]:
    local = Local(tmp_path / "root")
    yield local
    for container in json.loads(local("list", "--format", "json").stdout or "[]"):
        local("delete", "--force", container["id"])
    for path in (tmp_path / "root").glob("*") if (tmp_path / "root").exists() else ():
        local("delete", "--force", path.name)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "bundle", COUNT)
    return tmp_path / "bundle"


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """The same with a cgroup of its own."""
    from tests.support.boxes import make

    return make(tmp_path / "bundle", COUNT)


class Lab(Hosts):
    """host1 and host2 of a lab."""

    def __init__(self, name: str) -> None:
        self.environment = model.environment(name)
        self.name = name

    def lab(self, *argv: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [*PYMIGRATE, "lab", *argv], env=self.environment, capture_output=True, text=True, timeout=120,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    def up(self) -> None:
        """Make it, with a client that is not slow to try again."""
        self.lab("up")
        # What it has sent to a container in vain it sends again within a second, not after a time that doubles each
        # time. Linux 6.15; tests only take longer without.
        # As patient as ever otherwise: it is numbers of attempts that end in ETIMEDOUT.
        settings = {"tcp_rto_max_ms": 1000, "tcp_syn_retries": 120, "tcp_retries2": 120}
        script = "; ".join(f"echo {value} > /proc/sys/net/ipv4/{name}" for name, value in settings.items())
        self.sh("client", script, check=False)
        # A version manager in root's start-up files would cost every remote command 120 ms, two or more a move.
        for host in ("host1", "host2", "client"):
            self.sh(host, "[ ! -e /root/.bashrc ] || mount --bind /dev/null /root/.bashrc")

    def argv(self, host: str, *argv: object) -> list[str]:
        """What `pymigrate lab exec` does, without its command line: tests run thousands of commands."""
        there = model.find(self.name, host)
        return selfexec.command("migrate.lab.enter", str(there.pid), *there.cgroups, "--", *map(str, argv))

    def brief(self, host: str, *argv: object) -> list[str]:
        """Return a command that joins the host as `argv` does, in 4 ms instead of 25: without a Python interpreter."""
        there = model.find(self.name, host)
        leaves = [f"{path}/init" if os.path.isdir(f"{path}/init") else path for path in there.cgroups]
        joins = " && ".join(f"echo $$ > {path}/cgroup.procs" for path in leaves)
        return ["sh", "-c", f"{joins} && {_ENTER}", str(there.pid), *map(str, argv)]

    def put(self, host: str, directory: Path, place: str) -> None:
        # The hosts share this machine's /tmp; /var/lib/pymigrate is their own.
        self.sh(host, f"mkdir -p {Path(place).parent} && cp -a {directory} {place}")


@pytest.fixture(scope="session")
def lab_session() -> Iterator[Lab]:
    lab = Lab(f"test-{os.getpid()}")
    lab.up()
    yield lab
    lab.lab("down")


@pytest.fixture
def lab(lab_session: Lab, request: pytest.FixtureRequest) -> Iterator[Lab]:
    """The session's lab, without containers and what moves leave for the next one; made anew after a failed test."""
    yield lab_session
    if FAILED in request.node.stash:
        lab_session.lab("down")
        lab_session.up()
        return
    cleaning = [
        subprocess.Popen(
            lab_session.brief(host, "sh", "-c", _CLEAN), env=lab_session.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for host in ("host1", "host2")
    ]  # fmt: skip
    for process in cleaning:
        said = process.communicate(timeout=lab_session.timeout)
        assert process.returncode == 0, said
