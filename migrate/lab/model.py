"""Describe a lab on disk and in the kernel: names, addresses, directories, control groups."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from migrate import relaunch
from migrate.errors import MigrateError, UsageError
from migrate.paths import LAB as ROOT
from runtime.cgroups.hierarchies import discover

LARGEST = 50
CLIENT = "client"  # the name of a host to which no container moves
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")


class LabError(MigrateError):
    """A lab, or a host of it, could not be made, found or removed."""


class NoSuchHost(LabError):
    kind = "not-found"


def check_name(name: str, what: str = "host") -> str:
    """Return the name if it is valid for a host and in a path. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"invalid name for a {what}: {name[:60]!r}",
            remedy="a name is a letter, then letters, digits and -, at most 32",
        )
    return name


@dataclass(frozen=True)
class Host:
    """One host of a lab; all its files are below `directory`."""

    lab: str
    name: str
    number: int

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def container_addresses(self) -> tuple[str, str]:
        """Its addresses, with prefix lengths, in the containers' networks (10.88.0.0/24, fd88::/64)."""
        return f"10.88.0.{200 + self.number}/24", f"fd88::{200 + self.number}/64"

    @property
    def directory(self) -> Path:
        return ROOT / self.lab / self.name

    @property
    def clock_offset(self) -> int:
        """Seconds added to this machine's uptime, so that no two hosts of a lab show the same."""
        return self.number * 100_000

    @property
    def pid(self) -> int:
        """The pid of its first process, 0 if it is unknown."""
        try:
            return int((self.directory / "pid").read_text())
        except (OSError, ValueError):
            return 0

    @property
    def cgroups(self) -> list[str]:
        """Its directory in every hierarchy, which need not exist yet."""
        return [str(path / self.name) for path in lab_cgroups(self.lab)]


def lab_cgroups(lab: str) -> list[Path]:
    """Return the directory of a lab in every hierarchy; all its processes are below them."""
    return [Path(hierarchy.mountpoint, f"pymigrate-lab-{lab}") for hierarchy in discover()]


def current_lab() -> str:
    """Return the name of the current lab: $PYMIGRATE_LAB, or "lab"."""
    return check_name(os.environ.get("PYMIGRATE_LAB", "lab"), "lab")


def environment(lab: str) -> dict[str, str]:
    """Return the environment of a command in a host: root's login environment, with this pymigrate first in PATH."""
    return {
        "PATH": f"{relaunch.directory()}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "USER": "root",
        "LANG": "C.UTF-8",
        "TERM": os.environ.get("TERM", "dumb"),
        "PYMIGRATE_LAB": lab,
    }


def hosts(lab: str) -> list[Host]:
    """Return the hosts of a lab, by number; [] if it is not up."""
    found = []
    for path in (ROOT / lab).glob("*/number"):
        try:
            found.append(Host(lab, path.parent.name, int(path.read_text())))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda host: host.number)


def find(lab: str, name: str) -> Host:
    """Return the host `name`. Raises NoSuchHost."""
    for host in hosts(lab):
        if host.name == name:
            return host
    raise NoSuchHost(f"host {name} does not exist in the lab {lab}", remedy="`pymigrate lab up` makes host1 and host2")
