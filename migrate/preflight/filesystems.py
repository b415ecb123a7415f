"""Find file systems in a container that CRIU cannot mount again (criu/filesystems.c and validate_mounts, 4.2)."""

import os
from collections.abc import Iterable, Iterator

from migrate.files import mountinfo
from migrate.files.mountinfo import Mount
from migrate.preflight.rules import Blocker
from runtime.linux import processes

# The types that CRIU knows; it knows "fuse" too, but only to reject it.
_CARRIED = frozenset(
    (
        "proc", "sysfs", "devtmpfs", "binfmt_misc", "tmpfs", "devpts", "simfs", "pstore", "mqueue", "securityfs",
        "fusectl", "debugfs", "tracefs", "cgroup", "cgroup2", "aufs", "overlay", "autofs",
    )
)  # fmt: skip
_CGROUPS = ("cgroup", "cgroup2")  # the name of their root depends on the reader's cgroup namespace


def blockers(init_pid: int, external: Iterable[str]) -> Iterator[Blocker]:
    """Yield the mounts in the container, or in a mount namespace below it, that CRIU cannot carry.

    `external`: mount points whose contents are the host's, which a restore binds in again.
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
    """Return whether all of `mount` can be seen through `other` too."""
    return mount.device == other.device and mountinfo.is_below(mount.root, other.root)


def _problem(mount: Mount, mounts: list[Mount]) -> str | None:
    if mount.root == "/" or mount.fstype in _CGROUPS:
        return f"has a file system of type {mount.fstype}" if mount.fstype not in _CARRIED else None
    if any(other.device == mount.device and other.root == "/" for other in mounts):
        return None
    return f"shows {mount.root} of a file system of type {mount.fstype} that is mounted nowhere in the container"


def _one_of_each_namespace(init_pid: int) -> list[int]:
    """Return one process of each mount namespace in the container; its init for its own."""
    found: dict[int, int] = {}
    for pid in (init_pid, *processes.container_pids(init_pid)):
        try:
            found.setdefault(os.stat(f"/proc/{pid}/ns/mnt").st_ino, pid)
        except OSError:
            continue  # it has exited
    return list(found.values())
