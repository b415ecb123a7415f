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
    def save(self) -> None:
        """Save the container at the source to a snapshot in memory; it ends."""

    @abc.abstractmethod
    def restore(self) -> None:
        """Restore the container at the source from its snapshot."""

    @abc.abstractmethod
    def log(self, host: str) -> str:
        """Return what the program has written, as far as that host knows."""

    @abc.abstractmethod
    def check(self, host: str) -> None:
        """Have the program at a host check all its memory: send it SIGUSR1."""

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

    def save(self) -> None:
        self.call(SOURCE, "pymigrate", "snapshot", "save", "--stop", NAME, IMAGES)
        self.call(SOURCE, "pymigrate", "delete", "-f", NAME)

    def restore(self) -> None:
        self.call(SOURCE, "pymigrate", "snapshot", "restore", IMAGES)

    def log(self, host: str) -> str:
        return self.call(host, "pymigrate", "logs", NAME)

    def check(self, host: str) -> None:
        self.call(host, "pymigrate", "kill", NAME, "USR1")

    def remove(self) -> None:
        for host in (SOURCE, TARGET):
            self.hosts.sh(host, f"pymigrate delete -f {NAME} 2>&1; rm -rf {IMAGES} /var/lib/pymigrate/*", check=False)


class Runc(Way):
    key, title = "two", "runc, two ssh"
    text = "runc checkpoint && tar | ssh tar && ssh runc restore"

    def __init__(self, hosts: Hosts) -> None:
        super().__init__(hosts)
        # What pymigrate takes, because the distribution's criu does not work with every kernel.
        path = f"PATH={os.path.dirname(swrk.find())}:$PATH"
        images = f"--image-path {IMAGES} --work-path {DIRECTORY}"
        self._checkpoint = f"{path} runc checkpoint {images} {NAME}"
        # ssh would wait for the container as long as that has its stdout.
        self._restore = f"{path} runc restore -d -b {BUNDLE} {images} {NAME} < /dev/null > {LOG} 2>&1"

    def start(self) -> None:
        run = f"runc run -d -b {BUNDLE} {NAME} < /dev/null 2>&1"
        # CRIU cannot dump a file of the host as stdout, but it can dump a pipe.
        self.hosts.sh(SOURCE, f"mkdir -p {IMAGES}; : > {LOG}; {run} | cat > {LOG} 2>&1 &")
        self.hosts.sh(TARGET, f"mkdir -p {IMAGES}")

    def send(self) -> str:
        """Return the shell command that sends the images and restores the container there."""
        copy = f"tar -C {IMAGES} -cf - . | ssh {TARGET} tar -C {IMAGES} -xf -"
        return f"{copy} && ssh {TARGET} '{self._restore}'"

    def move(self) -> dict[str, Any]:
        self.call(SOURCE, "sh", "-c", f"{self._checkpoint} && {self.send()}")
        return {}

    def save(self) -> None:
        self.call(SOURCE, "sh", "-c", self._checkpoint)

    def restore(self) -> None:
        self.call(SOURCE, "sh", "-c", self._restore)

    def log(self, host: str) -> str:
        return self.call(host, "cat", LOG)

    def check(self, host: str) -> None:
        self.call(host, "runc", "kill", NAME, "USR1")

    def remove(self) -> None:
        for host in (SOURCE, TARGET):
            self.hosts.sh(host, f"runc delete -f {NAME} 2>&1; rm -rf {IMAGES} {LOG}", check=False)


class RuncOnce(Runc):
    key, title = "one", "runc, one ssh"
    text = "runc checkpoint && tar | ssh -c aes128-gcm@openssh.com 'tar && runc restore'"

    def send(self) -> str:
        unpack = f"tar -C {IMAGES} -xf -"
        return f"tar -C {IMAGES} -cf - . | ssh -c aes128-gcm@openssh.com {TARGET} '{unpack} && {self._restore}'"


WAYS: tuple[type[Way], ...] = (Ours, Runc, RuncOnce)
