"""Where the demo runs: two lab hosts on this machine, or this machine and another one that ssh reaches."""

import os
import shlex
import socket
import subprocess
import sys
from typing import Protocol

from migrate.errors import MigrateError

STEP_TIMEOUT = 180.0
HERE = "/var/lib/pymigrate/demo"
_LAB = "demo"
_PYMIGRATE = [sys.executable, "-m", "migrate.cli"]


class DemoFailed(MigrateError):
    """Something the demo checks did not hold."""


class Hosts(Protocol):
    """A `source` and a `target`, each by the name under which the other one knows it."""

    source: str
    target: str
    description: str

    def up(self) -> None: ...
    def down(self) -> None:
        """Remove all that the demo has made. Harmless when there is nothing."""
        ...

    def on(self, host: str, *argv: str, stdin: str = "") -> str:
        """Run a command in a host as root; its stdout. Raises DemoFailed."""
        ...


def _run(command: list[str], what: str, stdin: str, environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=environment, timeout=STEP_TIMEOUT
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DemoFailed(f"no end after {STEP_TIMEOUT:g} s: {what[:200]}") from None
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip()
        raise DemoFailed(f"exit status {done.returncode}: {what[:200]}\n{words}")
    return done.stdout


class LabHosts:
    """A lab of the demo's own."""

    source, target = "host1", "host2"
    description = "two hosts with a real sshd each, linked by a bridge"

    def __init__(self) -> None:
        self._environment = {**os.environ, "PYMIGRATE_LAB": _LAB}

    def up(self) -> None:
        self.down()
        self._lab("up")

    def down(self) -> None:
        self._lab("down")

    def on(self, host: str, *argv: str, stdin: str = "") -> str:
        return self._lab("exec", host, "--", *argv, stdin=stdin)

    def _lab(self, *argv: str, stdin: str = "") -> str:
        return _run([*_PYMIGRATE, "lab", *argv], shlex.join(["lab", *argv]), stdin, self._environment)


class ThisHost:
    """This machine alone, which is both source and target."""

    def __init__(self, container: str) -> None:
        self.source = self.target = self.description = socket.gethostname()
        self._container = container
        self._started = False

    def up(self) -> None:
        for host in self._each():
            if self._container in self.on(host, "pymigrate", "list", "-q").split():
                raise DemoFailed(f"{host} has a container {self._container} already", remedy="delete or rename it")
        self._remove_files()  # what an earlier one may have left
        self._started = True

    def down(self) -> None:
        if self._started:
            for host in self._each():
                self.on(host, "pymigrate", "delete", "--force", self._container)
            self._remove_files()

    def _each(self) -> list[str]:
        return list(dict.fromkeys((self.source, self.target)))

    def _remove_files(self) -> None:
        for host in self._each():
            self.on(host, "rm", "-rf", HERE, f"/var/lib/pymigrate/bundles/{self._container}")

    def on(self, host: str, *argv: str, stdin: str = "") -> str:
        if host == self.source:
            command = [*_PYMIGRATE, *argv[1:]] if argv[0] == "pymigrate" else list(argv)
        else:
            command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, "--", shlex.join(argv)]
        return _run(command, f"{host}: {shlex.join(argv)}", stdin)


class RealHosts(ThisHost):
    """This machine, and one that has pymigrate too: the demo comes back from there."""

    def __init__(self, target: str, container: str) -> None:
        super().__init__(container)
        self.target, self.description = target, f"{self.source} and {target}"

    def up(self) -> None:
        for host, other in ((self.source, self.target), (self.target, self.source)):
            self.on(host, "ssh", "-o", "BatchMode=yes", other, "true")
        super().up()
