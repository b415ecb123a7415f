"""The processor time that a cgroup may use: its own limit, one below that for a while, and what it has used.

`paths` maps a version 1 controller, or "" for version 2, to a directory of the container. Only the files are written:
systemd knows nothing of it, and would at worst write the container's own limit again.
"""

from __future__ import annotations

from runtime.cgroups.hierarchies import UNIFIED
from runtime.errors import ContainerError
from runtime.light.records import Record
from runtime.linux.files import flat_keyed, read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

_LEAST = 1000  # microseconds, the smallest quota that the kernel accepts


class Quota(Record):
    """A limit: `path` of its file, the text `own` that is in there, and the `period` in microseconds."""

    path: str
    own: str
    period: int

    @classmethod
    def of(cls, paths: Mapping[str, str]) -> Self:
        """Return the limit that a cgroup has now. Raises ContainerError if it cannot have one."""
        path = file_of(paths)
        try:
            if UNIFIED in paths and path.startswith(paths[UNIFIED]):
                own = read(path)
                return cls(path, own, int(own.split()[1]))
            return cls(path, read(path), int(read(f"{paths['cpu']}/cpu.cfs_period_us")))
        except (OSError, ValueError, IndexError) as error:
            raise ContainerError(f"{path}: cannot be read: {error}") from None

    @property
    def processors(self) -> float | None:
        """How many processors may be used at a time; None without a limit."""
        quota = self.own.split()[0]
        return int(quota) / self.period if quota.isdigit() else None

    def set(self, processors: float) -> None:
        """Let it use so many processors at a time, down to 1 ms in each period. Raises ContainerError."""
        self._write(str(max(_LEAST, int(processors * self.period))))

    def restore(self) -> None:
        """Give it its own limit again; harmless if the cgroup is gone. Raises ContainerError."""
        try:
            self._write(self.own)
        except ContainerError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    def _write(self, value: str) -> None:
        try:
            write(self.path, value)
        except OSError as error:
            raise ContainerError(f"{self.path}: cannot be written: {error.strerror}") from error


def file_of(paths: Mapping[str, str]) -> str:
    """Return the path of the file with the limit. Raises ContainerError if this host has none."""
    if set(paths) == {UNIFIED}:
        return f"{paths[UNIFIED]}/cpu.max"
    if "cpu" in paths:
        return f"{paths['cpu']}/cpu.cfs_quota_us"
    raise ContainerError("this host does not have a cpu cgroup")


def used(paths: Mapping[str, str]) -> float:
    """Return the seconds of processor time that the processes of a cgroup have used. Raises ContainerError."""
    try:
        if "cpuacct" in paths:
            return int(read(f"{paths['cpuacct']}/cpuacct.usage")) / 1e9
        return flat_keyed(read(f"{paths[UNIFIED]}/cpu.stat"))["usage_usec"] / 1e6
    except (OSError, ValueError, KeyError) as error:
        raise ContainerError(f"the processor time of the container cannot be read: {error}") from None
