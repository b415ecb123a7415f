"""Move processes between cgroups."""

from __future__ import annotations

from runtime.cgroups.hierarchies import UNIFIED, discover
from runtime.errors import ContainerError
from runtime.linux.files import read, write


def entrance(paths: dict[str, str], directory: str, pid: int) -> str:
    """Return the name of the file that takes a pid; 0 is the caller.

    The kernel moves whole processes under a lock that it gets after an RCU grace period: milliseconds. A single thread
    that moves itself on version 1 does not need the lock.
    """
    single = pid == 0 and paths.get(UNIFIED) != directory
    return "tasks" if single else "cgroup.procs"


def move_in(directory: str, pid: int, file: str) -> None:
    """Write a pid to a file of a cgroup. Raises ContainerError."""
    try:
        write(f"{directory}/{file}", str(pid))
    except OSError as error:
        raise not_taken(directory, pid, error) from None


def not_taken(directory: str, pid: int, error: OSError) -> ContainerError:
    return ContainerError(f"{directory}: cannot take process {pid}: {error.strerror}")


def unified_of(pid: int, otherwise: str) -> str:
    """Return the directory of a process's version 2 cgroup; `otherwise` if that is unknown."""
    try:
        lines = read(f"/proc/{pid}/cgroup").splitlines()
    except OSError:
        return otherwise
    mounts = [hierarchy.mountpoint for hierarchy in discover() if hierarchy.controllers == (UNIFIED,)]
    places = [line.removeprefix("0::") for line in lines if line.startswith("0::/")]
    return mounts[0] + places[0] if mounts and places else otherwise
