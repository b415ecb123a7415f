"""Three ways to take a container from host1 to host2: pymigrate, and what users write in shell around runc."""

import abc
import json
import os
import time
from collections.abc import Callable
from typing import Any, ClassVar

from criu_rpc import swrk
from tests.bench.writer import Seen, parse
from tests.support.hosts import Hosts

NAME = "web"
DIRECTORY = "/run/bench"  # of each host, in memory
BUNDLE = f"{DIRECTORY}/bundle"
LOG = f"{DIRECTORY}/log"  # runc's containers write here
IMAGES = f"{DIRECTORY}/images"
SOURCE, TARGET = "host1", "host2"
STEP = 0.1  # seconds between two looks at a log, each of which starts a process


class Failed(SystemExit):
    """A command, or what was awaited from the program, has failed: the benchmark ends with these words."""

    def __init__(self, words: str) -> None:
        super().__init__(f"bench: {words}")


class Way(abc.ABC):
    """How a container starts, moves and ends; `title` and `text` name and describe it in the table."""

    key: ClassVar[str]
    title: ClassVar[str]
    text: ClassVar[str]

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts

    def call(self, host: str, *argv: str, patience: float = 900.0) -> str:
        """Return what a command at a host writes to stdout. Raises Failed if it fails."""
        done = self.hosts.on(host, *argv, check=False, timeout=patience)
        if done.returncode:
            raise Failed(f"{self.title}: {argv[0]} at {host}: exit status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def until(self, host: str, true: Callable[[Seen], bool], what: str, patience: float = 120.0) -> Seen:
        """Return what the program has said as soon as that is `true`. Raises Failed after `patience` seconds."""
        deadline = time.monotonic() + patience
        while True:
            text = self.log(host)
            if true(seen := parse(text)):
                return seen
            if time.monotonic() > deadline:
                raise Failed(f"{self.title}: {what}: not within {patience:g} s. The program wrote: {text[-1000:]!r}")
            time.sleep(STEP)

    @abc.abstractmethod
    def start(self) -> None:
        """Run the bundle at the source."""

    @abc.abstractmethod
    def move(self) -> dict[str, Any]:
        """Move the container; return what the tool itself reports of it, {} if it reports nothing."""

    @abc.abstractmethod
    def log(self, host: str) -> str:
        """Return what the program has written, as far as that host knows."""

    @abc.abstractmethod
    def check(self) -> None:
        """Have the program at the target check all its memory: send it SIGUSR1."""

    @abc.abstractmethod
    def remove(self) -> None:
        """Remove the container and all that moving it has left, at both hosts."""


class Ours(Way):
    key, title, text = "ours", "pymigrate", "pymigrate move web host2"

    def __init__(self, hosts: Hosts, arguments: tuple[str, ...] = ()) -> None:
        super().__init__(hosts)
        self._arguments = arguments

    def start(self) -> None:
        self.call(SOURCE, "pymigrate", "run", "-d", "-b", BUNDLE, NAME)

    def move(self) -> dict[str, Any]:
        events = self.call(SOURCE, "pymigrate", "--json", "move", NAME, TARGET, *self._arguments).splitlines()
        report: dict[str, Any] = json.loads(events[-1])
        parsed = [json.loads(event) for event in events]
        report["rounds"] = [event for event in parsed if event["event"] == "round"]
        report["warnings"] = [event["message"] for event in parsed if event["event"] == "warning"]
        return report

    def log(self, host: str) -> str:
        return self.call(host, "pymigrate", "logs", NAME)

    def check(self) -> None:
        self.call(TARGET, "pymigrate", "kill", NAME, "USR1")

    def remove(self) -> None:
        for host in (SOURCE, TARGET):
            self.hosts.sh(host, f"pymigrate delete -f {NAME} 2>&1; rm -rf /var/lib/pymigrate/*", check=False)


class Runc(Way):
    """runc checkpoint, a copy over ssh, runc restore; images in memory at both ends, the bundle at both."""

    key, title = "two", "runc, two ssh"
    text = "runc checkpoint && tar | ssh tar && ssh runc restore"
    _SEND = (
        f"tar -C {IMAGES} -cf - . | ssh {TARGET} tar -C {IMAGES} -xf - && ssh {TARGET} {{restore}}"
    )  # fmt: skip

    def __init__(self, hosts: Hosts) -> None:
        super().__init__(hosts)
        # What pymigrate takes: the distribution's criu does not work with every kernel.
        self._path = f"PATH={os.path.dirname(swrk.find())}:$PATH"

    def start(self) -> None:
        # CRIU cannot dump a file of the host as stdout.
        self.hosts.sh(
            SOURCE, f"mkdir -p {IMAGES}; runc run -d -b {BUNDLE} {NAME} < /dev/null 2>&1 | cat > {LOG} 2>&1 &"
        )
        self.hosts.sh(TARGET, f"mkdir -p {IMAGES}")

    def move(self) -> dict[str, Any]:
        images = f"--image-path {IMAGES} --work-path {DIRECTORY}"
        restore = f"'{self._path} runc restore -d -b {BUNDLE} {images} {NAME} < /dev/null > {LOG} 2>&1'"
        checkpoint = f"{self._path} runc checkpoint {images} {NAME}"
        self.call(SOURCE, "sh", "-c", f"{checkpoint} && {self._SEND.format(restore=restore)}")
        return {}

    def log(self, host: str) -> str:
        return self.call(host, "cat", LOG)

    def check(self) -> None:
        self.call(TARGET, "runc", "kill", NAME, "USR1")

    def remove(self) -> None:
        for host in (SOURCE, TARGET):
            self.hosts.sh(host, f"runc delete -f {NAME} 2>&1; rm -rf {IMAGES} {LOG}", check=False)


class RuncOnce(Runc):
    key, title = "one", "runc, one ssh"
    text = "runc checkpoint && tar | ssh -c aes128-gcm@openssh.com 'tar && runc restore'"
    _SEND = (
        f"tar -C {IMAGES} -cf - . | ssh -c aes128-gcm@openssh.com {TARGET} 'tar -C {IMAGES} -xf - && '{{restore}}"
    )  # fmt: skip


WAYS: tuple[type[Way], ...] = (Ours, Runc, RuncOnce)
