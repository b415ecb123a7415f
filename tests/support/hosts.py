"""host1 and host2 as tests see them, whatever they are made of: commands run in them, containers count in them."""

import abc
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from runtime.linux import capabilities

ROOTFS = Path("/var/cache/pymigrate/rootfs/busybox")
COUNT = "i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"
# All that a root without CAP_SYS_RESOURCE can give.
ABLE = dict.fromkeys(("bounding", "effective", "permitted"), sorted(capabilities.NUMBERS.keys() - {"CAP_SYS_RESOURCE"}))
PYMIGRATE = [str(Path(sys.executable).with_name("pymigrate"))]  # `-m migrate.cli` takes longer than most verbs do

# `pymigrate move web host2` with {body} defined before, and something done at a point (migrate/faults.py): {before}
# when it is reached, {after} when what it surrounds is done. `value` is what the point carries.
_DRIVER = """
import os, signal, subprocess, sys, time
from migrate import faults
from migrate.cli import main
{body}
def before(value):
    {before}
def after(value):
    {after}
faults.at({point!r}, before=before, after=after)
sys.exit(main(["--json", "move", "web", "host2"]))
"""


def driver(point: str, *, before: str = "pass", after: str = "pass", body: str = "") -> str:
    """Return a Python program for a source that does something, as Python text, at a point of the move."""
    return _DRIVER.format(point=point, before=before, after=after, body=body)


def in_agent(text: str) -> str:
    """A Python program for a source that ends with a move: its agent runs `text` before it serves."""
    added = textwrap.indent(text.strip() + "\n", "    ")
    return (
        "from migrate.wire import agent_zip\n"
        "start = '    from migrate.target.agent'\n"
        f"agent_zip._MAIN = agent_zip._MAIN.replace(start, {added!r} + start)\n"
    )


def verb(*argv: str) -> str:
    """A Python program that is the command line with these arguments."""
    return f"import sys\nfrom migrate.cli import main\nsys.exit(main({list(argv)!r}))"


# For the shell of a target: kill the agent of the newest move into it, and nothing else.
KILL_AGENT = (
    'kill -9 $(sed -n \'s/.*"agent": {"pid": \\([0-9]*\\).*/\\1/p\' '
    "$(ls /var/lib/pymigrate/migrations/*.jsonl | tail -n 1))"
)
# Before a program for a source: the images of its move are on the target's disk.
NO_MEMORY = in_agent("from migrate.target import image_places\nimage_places.room = lambda **_: 0")


def write_bundle(bundle: Path, script: str, **changes: Any) -> None:
    """Write a bundle of busybox that runs `script`; `changes` replace top-level fields of the default config.json."""
    from runtime.spec.default import default_spec

    bundle.mkdir(parents=True)
    shutil.copytree(ROOTFS, bundle / "rootfs", symlinks=True)
    config = default_spec() | changes
    config["process"]["args"] = ["sh", "-c", script]
    (bundle / "config.json").write_text(json.dumps(config))


class Hosts(abc.ABC):
    """Two hosts with a container or two."""

    python = "python3"  # in a host that has pymigrate: the Python that it runs under
    patience = 60.0  # seconds in which a container must have counted further
    timeout = 200.0  # seconds in which a command must have ended
    environment: dict[str, str]

    @abc.abstractmethod
    def argv(self, host: str, *argv: object) -> list[str]:
        """The local command that runs a command in a host as root."""

    def brief(self, host: str, *argv: object) -> list[str]:
        """Return what `argv` returns, or something cheaper that does not pass on signals."""
        return self.argv(host, *argv)

    @abc.abstractmethod
    def put(self, host: str, directory: Path, place: str) -> None:
        """Make a directory of this machine the directory `place` in a host."""

    def on(
        self, host: str, *argv: object, check: bool = True, timeout: float | None = None
    ) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            self.brief(host, *argv), env=self.environment, capture_output=True, text=True,
            timeout=timeout or self.timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode < 0:
            done.returncode = 128 - done.returncode  # as a shell says it
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr)
        return done

    def start(self, host: str, *argv: object, stdin: int = subprocess.DEVNULL) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.argv(host, *argv), env=self.environment, stdin=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def sh(self, host: str, script: str, check: bool = True) -> str:
        return self.on(host, "sh", "-c", script, check=check).stdout

    def ids(self, host: str) -> list[str]:
        return self.on(host, "pymigrate", "list", "-q").stdout.split()

    def phases(self, host: str) -> list[str]:
        """Where the moves that a host has taken part in have ended, oldest first."""
        lines = self.on(host, "pymigrate", "--json", "migrations").stdout.splitlines()
        return [json.loads(line)["phase"] for line in lines]

    def state(self, host: str, container: str = "web") -> dict[str, Any]:
        text = self.on(host, "cat", f"/run/opencontainer/containers/{container}/state.json").stdout
        value: dict[str, Any] = json.loads(text)
        return value

    def count(self, host: str, container: str = "web") -> int:
        """The last number that the counting container wrote."""
        return int(self.on(host, "pymigrate", "logs", "--tail", "1", container).stdout)

    def numbers(self, host: str, container: str = "web") -> list[int]:
        """All numbers that the counting container wrote, on whatever host."""
        return [int(line) for line in self.on(host, "pymigrate", "logs", container).stdout.split()]

    def wait_count(self, host: str, beyond: int, container: str = "web") -> int:
        """Wait until the container has counted beyond a number: it runs, and it did not begin again."""
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            text = self.on(host, "pymigrate", "logs", "--tail", "1", container).stdout.strip()
            if text and int(text) > beyond:
                return int(text)
        raise AssertionError(f"{container} at {host} does not count beyond {beyond}")

    def run(
        self, host: str = "host1", container: str = "web", script: str = COUNT, *, start: bool = True, **changes: Any
    ) -> None:
        """Start a container of a bundle that lies on this host alone; only make the bundle without `start`."""
        with tempfile.TemporaryDirectory() as directory:
            write_bundle(Path(directory, container), script, **changes)
            self.put(host, Path(directory, container), f"/var/lib/pymigrate/test/{container}")
        if start:
            self.on(host, "pymigrate", "run", "-d", "-b", f"/var/lib/pymigrate/test/{container}", container)

    def images(self, host: str) -> list[str]:
        """The directories of images that a host has of moves into it."""
        return self.sh(host, "ls -d /run/pymigrate/images/memory/* /var/lib/pymigrate/incoming/*", check=False).split()

    def leftovers(self, host: str) -> str:
        """What a move may have left at a host: containers, monitors, agents, criu, rsync, images, cgroups."""
        return self.sh(
            host,
            "ls -A /run/opencontainer/containers 2>/dev/null; ls -A /var/lib/pymigrate/incoming 2>/dev/null; "
            "ls -d /run/pymigrate/images 2>/dev/null; "
            "ls -A /var/lib/pymigrate/bundles 2>/dev/null; ls -A /run/pymigrate/receiving 2>/dev/null; "
            "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline 2>/dev/null | "
            "grep -E 'runtime.monitor.main|/agent-[0-9a-f]{64}|criu|rsync|(pymigrate|migrate.cli) .*(run|create) ' "
            "| grep -v grep; done; find /sys/fs/cgroup -path '*/pymigrate/*' -type d",
            check=False,
        )
