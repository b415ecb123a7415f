"""Real containers on this machine, and a lab of two hosts with a real sshd each."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOTFS = Path("/var/cache/pymigrate/rootfs/busybox")
COUNT = "i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"
PYMIGRATE = [sys.executable, "-m", "migrate.cli"]


@pytest.fixture(scope="session", autouse=True)
def provisioned() -> None:
    if not ROOTFS.is_dir():
        pytest.exit(f"{ROOTFS} is missing: run `make setup`", returncode=1)


def write_bundle(bundle: Path, script: str, **changes: Any) -> None:
    """A bundle of busybox that runs `script`; `changes` replace top-level fields of the default config.json."""
    from runtime.default_spec import default_spec

    bundle.mkdir(parents=True)
    shutil.copytree(ROOTFS, bundle / "rootfs", symlinks=True)
    config = default_spec() | changes
    config["process"]["args"] = ["sh", "-c", script]
    (bundle / "config.json").write_text(json.dumps(config))


@dataclasses.dataclass
class Local:
    """pymigrate on this machine with a root directory of the test's own."""

    root: Path

    def __call__(self, *argv: object, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [*PYMIGRATE, "--root", str(self.root), *map(str, argv)],
            capture_output=True, text=True, timeout=60, **{"stdin": subprocess.DEVNULL, **options},
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


class Lab:
    """host1 and host2; commands run in them through the command line."""

    def __init__(self, name: str) -> None:
        self.env = {**os.environ, "PYMIGRATE_LAB": name}
        self.name = name

    def lab(self, *argv: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [*PYMIGRATE, "lab", *argv], env=self.env, capture_output=True, text=True, timeout=60,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    def argv(self, host: str, *argv: object) -> list[str]:
        return [*PYMIGRATE, "lab", "exec", host, "--", *map(str, argv)]

    def on(
        self, host: str, *argv: object, check: bool = True, timeout: float = 90
    ) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            self.argv(host, *argv), env=self.env, capture_output=True, text=True, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr)
        return done

    def start(self, host: str, *argv: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.argv(host, *argv), env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def sh(self, host: str, script: str, check: bool = True) -> str:
        return self.on(host, "sh", "-c", script, check=check).stdout

    def ids(self, host: str) -> list[str]:
        return self.on(host, "pymigrate", "list", "-q").stdout.split()

    def count(self, host: str, container: str = "web") -> int:
        """The last number that the counting container wrote."""
        return int(self.on(host, "pymigrate", "logs", "--tail", "1", container).stdout)

    def wait_count(self, host: str, beyond: int, container: str = "web") -> int:
        """Wait until the container has counted beyond a number: it runs, and it did not begin again."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            text = self.on(host, "pymigrate", "logs", "--tail", "1", container).stdout.strip()
            if text and int(text) > beyond:
                return int(text)
        raise AssertionError(f"{container} at {host} does not count beyond {beyond}")

    def run(self, host: str = "host1", container: str = "web", script: str = COUNT, **changes: Any) -> None:
        """Start a container of a bundle that lies on this host alone."""
        staged = Path("/tmp") / f"{self.name}-{container}"
        write_bundle(staged, script, **changes)
        try:
            self.sh(host, f"mkdir -p /var/lib/pymigrate/test && mv {staged} /var/lib/pymigrate/test/{container}")
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self.on(host, "pymigrate", "run", "-d", "-b", f"/var/lib/pymigrate/test/{container}", container)

    def leftovers(self, host: str) -> str:
        """What a move may have left at a host: containers, monitors, agents, criu, images, cgroups."""
        return self.sh(
            host,
            "ls -A /run/opencontainer/containers 2>/dev/null; ls -A /var/lib/pymigrate/incoming 2>/dev/null; "
            "ls -A /var/lib/pymigrate/bundles 2>/dev/null; "
            "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null | grep -E 'runtime.shim|agent-.*pyz|criu' "
            "| grep -v grep; done; find /sys/fs/cgroup -path '*/pymigrate/*' -type d",
            check=False,
        )


@pytest.fixture(scope="session")
def lab_session() -> Iterator[Lab]:
    lab = Lab(f"test-{os.getpid()}")
    lab.lab("up")
    yield lab
    lab.lab("down")


@pytest.fixture
def lab(lab_session: Lab) -> Iterator[Lab]:
    """The session's lab, without containers and what moves leave for the next one."""
    yield lab_session
    for host in ("host1", "host2"):
        lab_session.sh(
            host,
            "for i in $(pymigrate list -q 2>/dev/null); do pymigrate delete -f $i; done; "
            "rm -rf /var/lib/pymigrate/* /run/opencontainer",
        )
