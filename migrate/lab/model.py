"""What a lab is on disk and in the kernel: names, addresses, directories, control groups."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from migrate import relaunch
from migrate.errors import MigrateError, UsageError
from migrate.paths import LAB as ROOT
from runtime.cgroups.hierarchies import discover

LARGEST = 50
CLIENT = "client"  # the name of a host that no container is moved to
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")


class LabError(MigrateError):
    """A lab, or a host of it, could not be made, found or removed."""


class NoSuchHost(LabError):
    kind = "not-found"


def check_name(name: str, what: str = "host") -> str:
    """Return a name that is fit for a host and for a path. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:60]!r} is no name for a {what}",
            remedy="a name is a letter, then letters, digits and -, at most 32",
        )
    return name


@dataclass(frozen=True)
class Host:
    """One host of a lab. Everything of it on disk is below `directory`."""

    lab: str
    name: str
    number: int

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def container_addresses(self) -> tuple[str, str]:
        """Its addresses, with prefix lengths, in the networks that containers have theirs of: 10.88.0.5, fd88::5."""
        return f"10.88.0.{200 + self.number}/24", f"fd88::{200 + self.number}/64"

    @property
    def directory(self) -> Path:
        return ROOT / self.lab / self.name

    @property
    def clock_offset(self) -> int:
        """Seconds that it has been up for longer than this machine: no two hosts of a lab show the same uptime."""
        return self.number * 100_000

    @property
    def pid(self) -> int:
        """The pid of its first process, 0 if none is known."""
        try:
            return int((self.directory / "pid").read_text())
        except (OSError, ValueError):
            return 0

    @property
    def cgroups(self) -> list[str]:
        """Its directory in every hierarchy, made or not."""
        return [str(path / self.name) for path in lab_cgroups(self.lab)]


def lab_cgroups(lab: str) -> list[Path]:
    """The directory of a lab in every hierarchy: all its processes are below."""
    return [Path(hierarchy.mountpoint, f"pymigrate-lab-{lab}") for hierarchy in discover()]


def current_lab() -> str:
    """The lab that is meant: $PYMIGRATE_LAB, or "lab"."""
    return check_name(os.environ.get("PYMIGRATE_LAB", "lab"), "lab")


def environment(lab: str) -> dict[str, str]:
    """What a command in a host sees: root's log-in environment, with this pymigrate first on the PATH."""
    return {
        "PATH": f"{relaunch.directory()}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "USER": "root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        "PYMIGRATE_LAB": lab,
    }


def hosts(lab: str) -> list[Host]:
    """The hosts of a lab, by number; [] when it is not up."""
    found = []
    for path in (ROOT / lab).glob("*/number"):
        try:
            found.append(Host(lab, path.parent.name, int(path.read_text())))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda host: host.number)


def find(lab: str, name: str) -> Host:
    """The host `name`. Raises NoSuchHost."""
    for host in hosts(lab):
        if host.name == name:
            return host
    raise NoSuchHost(f"no host {name} in the lab {lab}", remedy="`pymigrate lab up` makes host1 and host2")
