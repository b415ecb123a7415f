"""What tracks the writes of a process, by the best way that the kernel has.

Userfaultfd's write protection (write_protection.py) never stops the program; soft-dirty bits (soft_dirty.py) are what
older kernels have, and processes that no system call can be injected into.
"""

from typing import Protocol

from migrate.memory import soft_dirty, write_protection
from migrate.memory.injector import Injector
from migrate.memory.layout import Range
from migrate.memory.soft_dirty import SoftDirty
from migrate.memory.tracking import TrackingFailed
from migrate.memory.write_protection import WriteProtection


class Tracker(Protocol):
    """The writes of one process."""

    def scan(self) -> list[Range]:
        """Return the pages written since the last scan, at first all that exist. Raises Gone."""

    def written(self) -> list[Range]:
        """Return the same of a frozen process, and change nothing. Raises Gone."""

    def close(self) -> None:
        """End tracking."""


def track(pid: int, init: int, injector: Injector) -> Tracker:
    """Begin to track a process of the container whose init is `init`. Raises TrackingFailed; it is unchanged then."""
    try:
        return WriteProtection(pid, injector)
    except TrackingFailed as error:
        if soft_dirty.support():
            raise
        try:
            return SoftDirty(pid, init)
        except TrackingFailed as other:
            raise TrackingFailed(f"{error}; {other}") from None


def support() -> str:
    """Return why this kernel cannot track writes, "" if it can."""
    problem = write_protection.support()
    return problem and soft_dirty.support() and f"{problem}; {soft_dirty.support()}"


def name() -> str:
    """Return the way in which this kernel tracks writes, in words."""
    return "soft-dirty bits" if write_protection.support() else "userfaultfd"
