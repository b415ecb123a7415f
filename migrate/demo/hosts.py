"""The hosts of the demo: two lab hosts on this machine, or this machine and another one that ssh reaches."""

import os
import shlex
import signal
import socket
import subprocess
from typing import TYPE_CHECKING, Protocol

from migrate import relaunch
from migrate.errors import DemoFailed
from migrate.files import marks
from migrate.paths import BUNDLES, TREE_MARKS
from migrate.paths import DEMO as HERE

if TYPE_CHECKING:
    from migrate.demo.client import Client

STEP_TIMEOUT = 180.0
UNDO_TIMEOUT = 60.0
_LAB = "demo"
_ADDRESS = "10.88.0.5"  # of the container, in the network of the lab's bridges


class Hosts(Protocol):
    """A `source` and a `target`, by the names that they use for each other, for one `container`."""

    source: str
    target: str
    container: str
    description: str
    net: str | None  # the container's --net, if it has one

    def up(self) -> None:
        """Prepare the hosts. Raises DemoFailed."""
        ...

    def down(self) -> list[str]:
        """Remove everything that the demo has made, if anything; return what could not be removed, and why."""
        ...

    def on(self, host: str, *argv: str, stdin: str = "") -> str:
        """Run a command on a host as root; return its stdout. Raises DemoFailed."""
        ...

    def client(self) -> "Client | None":
        """Start a client of the container on a third host; None if there is none."""
        ...


def _run(command: list[str], what: str, stdin: str, environment: dict[str, str] | None = None) -> str:
    """Run a command until it exits; return its stdout. An interrupt is passed on, and the command may roll back."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        out, words = process.communicate(stdin, timeout=STEP_TIMEOUT)
    except BaseException as error:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=UNDO_TIMEOUT)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if isinstance(error, subprocess.TimeoutExpired):
            raise DemoFailed(f"did not exit within {STEP_TIMEOUT:g} s: {what[:200]}") from None
        raise
    if process.returncode != 0:
        raise DemoFailed(f"exit status {process.returncode}: {what[:200]}\n{(words or out).strip()}")
    return out


class LabHosts:
    """Two hosts of a lab that only the demo uses."""

    source, target, container = "host1", "host2", "web"
    description = "two hosts with a real sshd each, and a client, linked by bridges"
    net: str | None = f"bridge=br0,ip={_ADDRESS}/24"

    def __init__(self) -> None:
        self._environment = {**os.environ, "PYMIGRATE_LAB": _LAB}

    def up(self) -> None:
        self._lab("down")
        self._lab("up")

    def down(self) -> list[str]:
        try:
            self._lab("down")
        except DemoFailed as error:
            return [str(error)]
        return []

    def on(self, host: str, *argv: str, stdin: str = "") -> str:
        return self._lab("exec", host, "--", *argv, stdin=stdin)

    def client(self) -> "Client | None":
        from migrate.demo.client import Client

        return Client(relaunch.argv("lab", "exec", "client", "--"), _ADDRESS, self._environment)

    def _lab(self, *argv: str, stdin: str = "") -> str:
        return _run(relaunch.argv("lab", *argv), shlex.join(["lab", *argv]), stdin, self._environment)


class RealHosts:
    """This machine and another one with pymigrate: the demo moves there and back.

    The container's name belongs to the demo, which may remove anything under it. Without a target, only this machine is
    used, the container has a name to work with (`--start`), and only its old bundle is removed.
    """

    net: str | None = None  # the demo cannot choose a bridge of real hosts

    def __init__(self, target: str | None) -> None:
        self.source = socket.gethostname()
        self.target = target or self.source
        self.container = "pymigrate-demo" if target else "web"
        self.description = f"{self.source} and {target}" if target else self.source
        self._hosts = list(dict.fromkeys((self.source, self.target)))
        self._started = False

    def up(self) -> None:
        for host, other in zip(self._hosts, reversed(self._hosts), strict=True):
            if host != other:
                self.on(host, "ssh", "-o", "BatchMode=yes", other, "true")
            try:
                there = self.on(host, "pymigrate", "list", "-q").split()
            except DemoFailed as error:
                raise DemoFailed(str(error), remedy=f"is pymigrate installed on {host}? vagrant/provision.sh") from None
            if self.container in there:
                raise DemoFailed(
                    f"{host} has a container {self.container} already", remedy=f"pymigrate delete -f {self.container}"
                )
        for host in self._hosts:  # files that an earlier demo may have left
            self.on(host, *self._remove_files)
        self._started = True

    def down(self) -> list[str]:
        problems = []
        for host in self._hosts if self._started else ():
            for command in (["pymigrate", "delete", "--force", self.container], self._remove_files):
                try:
                    self.on(host, *command)
                except DemoFailed as error:
                    problems.append(str(error))
        return problems

    @property
    def _remove_files(self) -> list[str]:
        places = [f"{HERE}/{self.container}", f"{HERE}/{self.container}.snapshot"]
        if len(self._hosts) > 1:
            bundle = str(BUNDLES / self.container)
            places += [bundle, str(TREE_MARKS / f"{marks.key(bundle)}.json")]
        return ["sh", "-c", f"rm -rf {shlex.join(places)} && {{ rmdir {HERE} 2>/dev/null || true; }}"]

    def on(self, host: str, *argv: str, stdin: str = "") -> str:
        if host == self.source:
            command = relaunch.argv(*argv[1:]) if argv[0] == "pymigrate" else list(argv)
        else:
            command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, "--", shlex.join(argv)]
        return _run(command, f"{host}: {shlex.join(argv)}", stdin)

    def client(self) -> "Client | None":
        return None
