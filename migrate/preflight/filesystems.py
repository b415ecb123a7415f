"""File systems mounted in a container that CRIU cannot mount again (criu/filesystems.c and validate_mounts, 4.2)."""

import os
from collections.abc import Iterable, Iterator

from migrate.files import mountinfo
from migrate.files.mountinfo import Mount
from migrate.preflight.rules import Blocker
from runtime.linux import processes

# Types that it knows; "fuse" is there only to be refused.
_CARRIED = frozenset(
    (
        "proc", "sysfs", "devtmpfs", "binfmt_misc", "tmpfs", "devpts", "simfs", "pstore", "mqueue", "securityfs",
        "fusectl", "debugfs", "tracefs", "cgroup", "cgroup2", "aufs", "overlay", "autofs",
    )
)  # fmt: skip
_CGROUPS = ("cgroup", "cgroup2")  # what their root is called depends on the cgroup namespace of the reader


def blockers(init_pid: int, external: Iterable[str]) -> Iterator[Blocker]:
    """What is mounted in the container, or in a mount namespace below it, that CRIU cannot carry.

    `external` are the mount points whose contents are the host's: those are bound in again at a restore.
    """
    own = mountinfo.read(init_pid)
    places = {"/", *external}
    outside = [mount for mount in own if mount.place in places]
    for pid in _one_of_each_namespace(init_pid):
        mounts = own if pid == init_pid else mountinfo.read(pid)
        for mount in mounts:
            if not any(_is_part(mount, other) for other in outside) and (problem := _problem(mount, mounts)):
                where = mount.place if pid == init_pid else f"{mount.place}, in the mount namespace of process {pid}"
                yield Blocker("file-system", where, problem)


def _is_part(mount: Mount, other: Mount) -> bool:
    """Whether all of a mount can be seen through the other one, too."""
    return mount.device == other.device and mountinfo.is_below(mount.root, other.root)


def _problem(mount: Mount, mounts: list[Mount]) -> str | None:
    if mount.root == "/" or mount.fstype in _CGROUPS:
        return f"has a file system of type {mount.fstype}" if mount.fstype not in _CARRIED else None
    if any(other.device == mount.device and other.root == "/" for other in mounts):
        return None
    return f"shows {mount.root} of a file system of type {mount.fstype} that is mounted nowhere in the container"


def _one_of_each_namespace(init_pid: int) -> list[int]:
    """A process of each mount namespace in the container, its first process for its own."""
    found: dict[int, int] = {}
    for pid in (init_pid, *processes.container_pids(init_pid)):
        try:
            found.setdefault(os.stat(f"/proc/{pid}/ns/mnt").st_ino, pid)
        except OSError:
            continue  # it has ended
    return list(found.values())
