"""The cgroups of a container's monitor, beside those of the container.

The monitor must not stay in its starter's cgroup: a service manager may kill everything there (a log-in session, sshd's
unit), and a container without its monitor dies of a broken pipe. With systemd it gets its own scope, because only
systemd may make the cgroups of a slice, and stopping the container's unit must not kill its monitor.
"""

from __future__ import annotations

import os

from runtime.cgroups.hierarchies import UNIFIED, inherit_cpuset
from runtime.cgroups.moving import entrance, move_in
from runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.cgroups.cgroup import Cgroup

_MONITOR = "@monitor"  # a character that no id has: it cannot be the cgroup of another container


def directories(cgroup: Cgroup) -> list[str]:
    """Return the monitor's directory for each directory of the container."""
    if cgroup.unit is None:
        return [directory + _MONITOR for directory in cgroup.directories()]
    from runtime.cgroups.systemd import monitor_unit

    return [f"{os.path.dirname(directory)}/{monitor_unit(cgroup.unit)}" for directory in cgroup.directories()]


def birthplace(cgroup: Cgroup) -> int:
    """Make the version 2 directory; return a descriptor for fork_into, -1 without version 2. Raises ContainerError."""
    if cgroup.unit is not None or UNIFIED not in cgroup.paths:
        return -1
    directory = cgroup.paths[UNIFIED] + _MONITOR
    try:
        os.makedirs(directory, 0o755, exist_ok=True)
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ContainerError(f"cannot make the cgroup {directory}: {error.strerror}") from None


def add(cgroup: Cgroup, pid: int, *, but_unified: bool = False) -> None:
    """Move the monitor in; 0 is the caller. Raises ContainerError."""
    if cgroup.unit is not None:
        from runtime.cgroups import systemd as driver

        lies_in = os.path.basename(os.path.dirname(cgroup.directories()[0]))
        driver.start_monitor(cgroup.unit, lies_in if lies_in.endswith(".slice") else "-.slice", pid)
    for directory, monitors in zip(cgroup.directories(), directories(cgroup), strict=True):
        if but_unified and directory == cgroup.paths.get(UNIFIED):
            continue
        try:
            os.mkdir(monitors, 0o755)
        except FileExistsError:
            pass
        except OSError as error:
            raise ContainerError(f"cannot make the cgroup {monitors}: {error.strerror}") from None
        if cgroup.paths.get("cpuset") == directory:
            inherit_cpuset(monitors)
        move_in(monitors, pid, entrance(cgroup.paths, directory, pid))


def put_aside(cgroup: Cgroup, pid: int) -> None:
    """Move one of our processes from the container's cgroup to the monitor's. Raises ContainerError."""
    there = [directory for directory in directories(cgroup) if os.path.isdir(directory)]
    if not there:
        add(cgroup, pid)
    for directory in there:
        move_in(directory, pid, "cgroup.procs")
