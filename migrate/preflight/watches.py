"""Check inotify and fanotify watches: CRIU must find a name in the container for each watched file.

The kernel shows inode, device and handle of a watched file (proc_pid_fdinfo(5)). CRIU opens the handle on the
container's mounts, and checks that the name which the kernel then shows leads to the same file (criu/fsnotify.c). If
no handle can be opened (overlay, proc, sysfs), or the name leads to another file, CRIU looks for the inode among the
names that it was given (criu/irmap.c), but not on a tmpfs.
"""

import contextlib
import os
import re
import stat
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from migrate.files import mountinfo
from migrate.files.mountinfo import Mount
from migrate.preflight.rules import Blocker
from runtime.linux import processes, syscalls

LINKS = ("anon_inode:inotify", "anon_inode:[fanotify]")
_FILE = re.compile(
    r"(inotify wd:[0-9a-f]+|fanotify) ino:([0-9a-f]+) sdev:([0-9a-f]+) .*?mask:([0-9a-f]+)"
    r"(?:.* fhandle-bytes:[0-9a-f]+ fhandle-type:([0-9a-f]+) f_handle:([0-9a-f]*))?"
)
_MOUNT = re.compile(r"fanotify mnt_id:([0-9a-f]+) ")
_WHOLE = re.compile(r"fanotify (?:sdev|mnt_ns):[0-9a-f]+ ")
_IN_ONESHOT = 0x80000000
_MINOR_BITS = 20  # of a device number in the kernel
_SEARCH_TIME = 5.0  # seconds, for all files that have to be searched for by name


class Watches:
    """The watches of a container's processes; each file is reported once."""

    def __init__(self, init_pid: int) -> None:
        self._init_pid = init_pid
        self._views: dict[str, _View] = {}  # by mount namespace
        self._seen: set[str] = set()
        self._search_time = _SEARCH_TIME
        self._names: list[tuple[bool, int, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for view in self._views.values():
            view.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of watched files that CRIU must be given (DumpOptions.irmap_scan_paths).

        CRIU walks through each directory before it tries the next name, so files come first, then small trees.
        """
        return tuple(name for *_, name in sorted(self._names))

    def look(self, pid: int, number: str, where: str) -> Iterator[Blocker]:
        """Yield the watches of a descriptor that CRIU cannot carry. Raises OSError if the process has exited."""
        self._view(self._init_pid)
        self._view(pid)
        for line in Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines():
            watched = line.partition(" ino:")[2] or line
            problem = self._problem(line) if watched not in self._seen else ""
            self._seen.add(watched)
            if problem:
                yield Blocker("watch", where, f"watches {problem}")

    def _view(self, pid: int) -> "_View":
        namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        if namespace not in self._views:
            self._views[namespace] = _View(pid)
        return self._views[namespace]

    def _problem(self, line: str) -> str:
        if match := _MOUNT.match(line):
            known = any(int(match[1], 16) in view.mount_ids() for view in self._views.values())
            return "" if known else f"mount {int(match[1], 16)}, which is not in the container"
        if _WHOLE.match(line):
            return "a whole file system or mount namespace, which CRIU would lose silently"
        if not (match := _FILE.match(line)):
            return ""
        inode, device, mask = (int(match[number], 16) for number in (2, 3, 4))
        if match[5] is None:
            return f"inode {inode}, for which the kernel shows no handle"
        name, problem = self._file(device, inode, int(match[5], 16), bytes.fromhex(match[6]))
        if not problem and match[1] != "fanotify" and mask & _IN_ONESHOT:
            problem = "for one event only (IN_ONESHOT): after the move it would report all events"
        return f"{name}, {problem}" if problem else ""

    def _file(self, number: int, inode: int, kind: int, handle: bytes) -> tuple[str, str]:
        """Return the name of a watched file, and why CRIU cannot find it ("": it can); `number` is the device's."""
        device = f"{number >> _MINOR_BITS}:{number & (1 << _MINOR_BITS) - 1}"
        mounts = [mount for view in self._views.values() for mount in view.mounts if mount.device == device]
        if not mounts:
            return f"inode {inode} of device {device}", "which is not mounted in the container"
        links = []
        for view in self._views.values():
            for link, is_there in view.by_handle(device, inode, kind, handle):
                if is_there:
                    return link, ""
                links.append(link)
        started = time.monotonic()
        found = self._view(self._init_pid).search(device, (number, inode), started + self._search_time)
        self._search_time -= time.monotonic() - started
        if found is not None and not (links and mounts[0].fstype in ("tmpfs", "devtmpfs")):
            self._give(*found)
            return found[0], ""
        names = [found[0]] if found is not None else [link for link in links if link != "/"]
        text = f"inode {inode} of the {mounts[0].fstype} on {mounts[0].place}"
        return f"{names[0]} ({text})" if names else text, "whose name CRIU cannot find in the container"

    def _give(self, path: str, is_directory: bool) -> None:
        if path != "/":  # CRIU searches there by itself
            self._names.append((is_directory, -path.count("/"), path))


class _View:
    """The files of a mount namespace, as the process `pid` sees them. Raises OSError if that has exited."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY)
        self.mounts = mountinfo.read(pid)
        self._walks: dict[str, Generator[tuple[str, os.stat_result]]] = {}  # by device
        self._found: dict[tuple[int, int], tuple[str, bool]] = {}

    def close(self) -> None:
        for walk in self._walks.values():
            walk.close()
        os.close(self._root)

    def mount_ids(self) -> set[int]:
        return mountinfo.ids(self._pid)

    def by_handle(self, device: str, inode: int, kind: int, handle: bytes) -> Iterator[tuple[str, bool]]:
        """Yield, for each mount on which the handle can be opened, the file's name and whether the name leads to it."""
        for mount in self.mounts:
            if mount.device == device:
                with contextlib.suppress(OSError):
                    link = self._link(mount, kind, handle)
                    yield link, self._inode(link) == inode

    def _link(self, mount: Mount, kind: int, handle: bytes) -> str:
        place = syscalls.open_in_root(self._root, mount.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fd = syscalls.open_by_handle(place, kind, handle, os.O_PATH)
        finally:
            os.close(place)
        try:
            return os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)

    def _inode(self, path: str) -> int:
        try:
            fd = syscalls.open_in_root(self._root, path, os.O_PATH)
        except OSError:
            return -1
        try:
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    def search(self, device: str, wanted: tuple[int, int], deadline: float) -> tuple[str, bool] | None:
        """Return the first name found on a device's mounts for the file `wanted`, and whether it is a directory."""
        walk = self._walks.setdefault(device, self._walk_all(device))
        while wanted not in self._found and time.monotonic() < deadline:
            if (entry := next(walk, None)) is None:
                return None
            path, info = entry
            self._found.setdefault(_identity(info), (path, stat.S_ISDIR(info.st_mode)))
        return self._found.get(wanted)

    def _walk_all(self, device: str) -> Generator[tuple[str, os.stat_result]]:
        for deep in (False, True):
            for mount in self.mounts:
                if mount.device == device:
                    yield from self._walk(mount.place, deep)

    def _walk(self, top: str, deep: bool) -> Generator[tuple[str, os.stat_result]]:
        """Yield `top`, and with `deep` all files below it on the same file system; follow no symbolic link."""
        try:
            fd = syscalls.open_in_root(self._root, top, os.O_RDONLY | os.O_DIRECTORY if deep else os.O_PATH)
        except OSError:
            return
        try:
            here = os.fstat(fd)
            yield top, here
            for path, directories, files, below in os.fwalk(".", dir_fd=fd) if deep else ():
                for name in (*directories, *files):
                    with contextlib.suppress(OSError):
                        info = os.stat(name, dir_fd=below, follow_symlinks=False)
                        if info.st_dev != here.st_dev and name in directories:
                            directories.remove(name)
                        yield os.path.normpath(f"{top}/{path}/{name}"), info
        except (OSError, RecursionError):
            return
        finally:
            os.close(fd)


def names(init_pid: int) -> tuple[str, ...]:
    """Return the names of watched files that CRIU must be given, for the container of this init."""
    with Watches(init_pid) as watches:
        for pid in processes.container_pids(init_pid):
            with contextlib.suppress(OSError):
                for number in os.listdir(f"/proc/{pid}/fd"):
                    if os.readlink(f"/proc/{pid}/fd/{number}") in LINKS:
                        list(watches.look(pid, number, ""))
        return watches.names


def _identity(info: os.stat_result) -> tuple[int, int]:
    """Return the device, as the kernel numbers it, and the inode."""
    return os.major(info.st_dev) << _MINOR_BITS | os.minor(info.st_dev), info.st_ino
