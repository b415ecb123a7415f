"""Leeway for CRIU while it makes processes in a container's cgroup, where the limits of the container count for CRIU.

CRIU is a process or more beyond a pids limit, needs memory of its own, and computes at the speed that a small quota
allows. So hard limits are lifted for the restore, by their files alone (systemd knows nothing of it), and are set
again when the processes exist and are held: before they run.
"""

from __future__ import annotations

import errno
import os
import time

from runtime import notices
from runtime.cgroups.hierarchies import UNIFIED
from runtime.errors import ContainerError
from runtime.limits import LEEWAY_TIMEOUT
from runtime.linux.files import read, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Bytes that CRIU may use in the cgroup when it has finished: its own (3 MiB measured), and for each process that it has
# made (130 KiB measured). They are free again when it has exited.
_SPARE, _SPARE_EACH = 16 << 20, 256 << 10
# controller, file, value that lifts the limit; memory and swap together before memory, because it is wider
_V1 = (
    ("pids", "pids.max", "max"),
    ("cpu", "cpu.cfs_quota_us", "-1"),
    ("memory", "memory.memsw.limit_in_bytes", "-1"),
    ("memory", "memory.limit_in_bytes", "-1"),
)
_V2 = (
    (UNIFIED, "pids.max", "max"),
    (UNIFIED, "cpu.max", "max"),
    (UNIFIED, "memory.high", "max"),
    (UNIFIED, "memory.max", "max"),
)
_MEMORY = {"memory.limit_in_bytes": "memory.usage_in_bytes", "memory.max": "memory.current"}


class Leeway:
    """Call `lift`, then `end` when the processes are held, then `settle` when CRIU has exited."""

    def __init__(self) -> None:
        self._limits: list[tuple[str, str]] = []  # path of a file and its limit, in the order of lifting

    def lift(self, paths: Mapping[str, str]) -> None:
        """Lift the limits of a cgroup, in its directories `paths` (Cgroup.paths). Raises ContainerError."""
        for controller, name, unlimited in _V2 if set(paths) == {UNIFIED} else _V1:
            if controller not in paths:
                continue
            path = f"{paths[controller]}/{name}"
            try:
                limit = read(path)
                write(path, unlimited)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINVAL):
                    continue  # no such controller or file here
                raise _unwritable(path, error) from None
            self._limits.append((path, limit))

    def end(self) -> None:
        """Set the limits before the container runs. Raises ContainerError if its memory does not fit.

        A memory limit that only CRIU's own memory exceeds waits for `settle`.
        """
        late = []
        for path, limit in reversed(self._limits):
            usage = _MEMORY.get(path.rpartition("/")[2])
            if usage is not None and limit.isdigit() and (excess := _excess(path, usage, int(limit))) > 0:
                if excess > _SPARE + _SPARE_EACH * len(read(f"{os.path.dirname(path)}/cgroup.procs").split()):
                    raise ContainerError(
                        f"the container's memory does not fit into its limit of {int(limit) >> 10} KiB here: "
                        f"{excess >> 10} KiB more are needed",
                        remedy="raise the limit (`pymigrate update --memory`); has this host as much swap?",
                    )
                late.append((path, limit))
                continue
            try:
                write(path, limit)
            except OSError as error:
                if late and "memory" in path:
                    late.append((path, limit))  # together with the limit of memory alone
                    continue
                raise _unwritable(path, error) from None
        self._limits = late

    def settle(self) -> None:
        """Set the limits that had to wait until CRIU exited; the container runs already."""
        deadline = time.monotonic() + LEEWAY_TIMEOUT
        for path, limit in self._limits:
            usage = _MEMORY.get(path.rpartition("/")[2])
            try:
                while usage is not None and _excess(path, usage, int(limit)) > 0 and time.monotonic() < deadline:
                    time.sleep(0.005)
                write(path, limit)
            except OSError as error:
                notices.warn(f"{path}: the limit of {limit} cannot be set again: {error.strerror}")
        self._limits = []


def _excess(path: str, usage: str, limit: int) -> int:
    """Return by how many bytes the memory in use exceeds a limit after the kernel has reclaimed what it can."""
    directory, _, name = path.rpartition("/")
    excess = int(read(f"{directory}/{usage}")) - limit
    if excess <= 0:
        return excess
    if name == "memory.max":
        high = read(f"{directory}/memory.high")
        try:
            write(f"{directory}/memory.high", str(limit))  # unlike memory.max it kills nothing
        finally:
            write(f"{directory}/memory.high", high)
    else:
        try:
            write(path, str(limit))  # this fails, and kills nothing, if the memory does not fit
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
    return int(read(f"{directory}/{usage}")) - limit


def _unwritable(path: str, error: OSError) -> ContainerError:
    return ContainerError(f"{path}: cannot be written: {error.strerror}")
