"""Find where the cgroup hierarchies of this host are mounted (proc_pid_mountinfo(5), cgroups(7))."""

from __future__ import annotations

import os
import time

from runtime.errors import ContainerError, DeadlineExceeded
from runtime.light.records import Record
from runtime.linux.files import read, write

UNIFIED = ""
_V1 = frozenset(
    ("cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "net_cls", "net_prio", "hugetlb",
     "perf_event", "rdma", "misc")
)  # fmt: skip
# Version 2 controllers that a container's limits may need.
_WANTED = ("cpu", "cpuset", "memory", "pids", "io", "hugetlb", "rdma")
_MAKE_ATTEMPTS = 100
# Set on each directory that we make. trusted.* needs privileges, user.* works on version 2 only (xattr(7)).
_MARKS = ("trusted.pymigrate", "user.pymigrate")


class Hierarchy(Record):
    """One mounted hierarchy: `controllers` of version 1 (a named one as "name=systemd"), or (UNIFIED,).

    Containers live below its mount point, as runc's do: below our own cgroup they would end with a log-in session.
    """

    mountpoint: str
    controllers: tuple[str, ...]

    def make(self, path: str) -> bool:
        """Make the cgroup `path` and make it usable: set cpuset values, delegate controllers.

        Returns whether it was not there before. Raises OSError.
        """
        new = self._make_directory(path)
        if self.controllers == (UNIFIED,):
            parents, parent = [], os.path.dirname(path)
            while len(parent) >= len(self.mountpoint):
                parents.append(parent)
                parent = os.path.dirname(parent) if parent != "/" else ""
            for directory in reversed(parents):
                _delegate(directory)
        elif "cpuset" in self.controllers:
            inherit_cpuset(path)
        return new

    def _make_directory(self, path: str) -> bool:
        for _ in range(_MAKE_ATTEMPTS):
            try:
                os.mkdir(path)
                os.chmod(path, 0o755)  # whatever our umask is, because the root of a user namespace passes through
                _mark(path)
                return True
            except FileExistsError:
                return False
            except FileNotFoundError:
                # The removal of another container may remove an empty parent before we have used it.
                if len(path) <= len(self.mountpoint):
                    raise
                self._make_directory(os.path.dirname(path))
        raise ContainerError(f"cannot make the cgroup {path}: its parent is removed again and again")


def _mark(path: str, owner: bytes = b"") -> None:
    for name in _MARKS:
        try:
            os.setxattr(path, name, owner)
            return
        except OSError:
            continue  # then it stays even if it is empty


def own(path: str, owner: bytes, *, new: bool) -> None:
    """Mark the owner of a directory. One that existed before and has no mark of ours stays unmarked."""
    if new or owner_of(path) is not None:
        _mark(path, owner)


def owner_of(path: str) -> bytes | None:
    """Return the mark of `own`: b"" for a mere parent, None for a directory that we have not made or that is gone."""
    for name in _MARKS:
        try:
            return os.getxattr(path, name)
        except OSError:
            continue
    return None


def remove_parents(path: str) -> None:
    """Remove the parents of a removed cgroup, upwards as long as they are empty and made by us.

    The mark is on the directory itself: of several containers below one parent the last to go removes it, whichever
    has made it, and what was there before us stays.
    """
    parent = os.path.dirname(path)
    while owner_of(parent) == b"":
        try:
            os.rmdir(parent)
        except OSError:
            return  # in use
        parent = os.path.dirname(parent)


def discover(mountinfo: str | None = None) -> list[Hierarchy]:
    """Return the hierarchies that this process sees. Tests pass `text` instead of /proc/self/mountinfo."""
    if mountinfo is None:
        with open("/proc/self/mountinfo", errors="surrogateescape") as file:
            mountinfo = file.read()
    found: dict[tuple[str, ...], Hierarchy] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ")[:3]
        if kind == "cgroup2":
            controllers: tuple[str, ...] = (UNIFIED,)
        elif kind == "cgroup":
            controllers = tuple(name for name in options.split(",") if name in _V1 or name.startswith("name="))
        else:
            continue
        if controllers and controllers not in found:
            mountpoint = before.split(" ")[4]
            if "\\" in mountpoint:
                mountpoint = mountpoint.encode().decode("unicode_escape")
            found[controllers] = Hierarchy(mountpoint, controllers)
    return list(found.values())


def inherit_cpuset(directory: str) -> None:
    """Copy processors and memory nodes from the parent: a new version 1 cpuset has none and takes no process.

    Nor may it get any before its parent has: one that another process has just made may still be without.
    """
    for name in ("cpuset.cpus", "cpuset.mems"):
        if not read(f"{directory}/{name}"):
            parent = os.path.dirname(directory)
            if not read(f"{parent}/{name}"):
                inherit_cpuset(parent)
            write(f"{directory}/{name}", read(f"{parent}/{name}"))


def _delegate(directory: str) -> None:
    """Enable controllers for the children of a version 2 cgroup. A refusal shows when a limit is set."""
    try:
        there = read(f"{directory}/cgroup.controllers").split()
        given = read(f"{directory}/cgroup.subtree_control").split()
    except FileNotFoundError:
        return
    missing = [f"+{name}" for name in _WANTED if name in there and name not in given]
    for change in [" ".join(missing), *missing] if missing else ():
        try:
            write(f"{directory}/cgroup.subtree_control", change)
        except OSError:  # one unavailable controller makes the whole line fail, so write them one by one
            continue
        if change == " ".join(missing):
            return


def remove_tree(directory: str, deadline: float) -> None:
    """Remove a cgroup and all below it; harmless if it is gone. Raises DeadlineExceeded at `deadline` (monotonic)."""
    try:
        os.rmdir(directory)  # most have nothing below them
        return
    except OSError:
        pass
    while True:
        try:
            for path in reversed(below(directory)):
                os.rmdir(path)
            return
        except FileNotFoundError:  # another remover was faster
            if not os.path.exists(directory):
                return
        except OSError as error:
            # A process that has just died is still counted for a moment.
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the cgroup {directory} cannot be removed: {error.strerror}") from None
            time.sleep(0.001)


def below(directory: str) -> list[str]:
    """Return the directory and all cgroups below it, parents first; [] if it is gone."""
    try:
        # A directory's link count is two more than its subdirectories, so most need not be listed.
        if os.stat(directory).st_nlink == 2:
            return [directory]
        with os.scandir(directory) as entries:
            children = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [directory, *(path for child in children for path in below(child))]
