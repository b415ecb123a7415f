"""Send the contents of a container's tmpfs mounts ahead, as trees of files like a writable root file system.

CRIU would pack all of it while the container is frozen. It is told that such a mount is external; the target makes a
tmpfs with the same options, which the passes of source/seeding.py fill, and has CRIU bind that in its place. This
applies only to mounts that the bundle asks for, or that mask a directory, and whose attributes are all known. CRIU
carries all others, and small ones, for which it is faster. An empty one is sent ahead at no cost: CRIU takes 5 ms to
pack it, and 5 ms to unpack it, while the container is frozen.

Stores to a mapped file need not change its times in a tmpfs. Files that may have been mapped since the first scan are
therefore compared by contents: mapped files, those open for reading and writing, and those closed after writing.
"""

import contextlib
import math
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

from migrate.errors import MigrateError
from migrate.files import mountinfo
from migrate.files import scan as tree_scan
from migrate.files.trees import Mounted, are_tmpfs_options
from migrate.limits import TMPFS_OPEN_TIMEOUT
from runtime.linux import processes, selfexec, syscalls
from runtime.spec.config import Spec
from runtime.state.record import State

SMALL = 4 << 20  # bytes that CRIU packs in less time than a pass takes
MOST = 20  # mounts
# fanotify(7): metadata, then a record with a file system id and a handle; shmem's is generation, inode (64 bits)
_METADATA, _HANDLE = struct.Struct("=IBBHQii"), struct.Struct("=BBH8sIiIII")
_INFO_FID, _HANDLE_BYTES, _INO32_GEN = 1, 12, 1


class View:
    """A tmpfs mount, open for reading; it records which files are written to from now on. `close` it."""

    def __init__(self, mounted: Mounted, mount: mountinfo.Mount, fd: int) -> None:
        self.mounted, self.mount, self._fd = mounted, mount, fd
        self.overflowed = False  # more files were written to than the queue could hold
        try:
            self._closed = syscalls.fanotify_init(syscalls.FAN_REPORT_FID, os.O_RDONLY)
            try:
                syscalls.fanotify_mark(self._closed, syscalls.FAN_MARK_FILESYSTEM, syscalls.FAN_CLOSE_WRITE, self.path)
            except BaseException:
                os.close(self._closed)
                raise
        except BaseException:
            os.close(fd)
            raise

    @property
    def path(self) -> str:
        """The path of its root, for every process of this host."""
        return f"/proc/{os.getpid()}/fd/{self._fd}/."

    @property
    def is_expected(self) -> bool:
        return mountinfo.device(os.stat(self.path)) == self.mount.device

    @property
    def is_empty(self) -> bool:
        return not os.listdir(self.path)

    def stored(self, init_pid: int) -> set[int]:
        """Return the inodes of files whose contents may have changed, or still can, without a change of their times."""
        found = tree_scan.open_for_both(init_pid, os.stat(self.path).st_dev)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._closed, 1 << 16):
                found |= self._inodes(data)
        return found

    def _inodes(self, data: bytes) -> set[int]:
        found, at = set(), 0
        while at < len(data):
            length, _, _, start, _, _, _ = _METADATA.unpack_from(data, at)
            inode = _inode(data[at + start : at + length])
            if inode is None:
                self.overflowed = True
            else:
                found.add(inode)
            at += length
        return found

    def close(self) -> None:
        os.close(self._closed)
        os.close(self._fd)


def verify(views: Iterable[View], state: State, spec: Spec) -> None:
    """Raise MigrateError if the container has changed its mounts since the views were opened."""
    now = dict(_suitable(state, spec))
    for view in views:
        if now.get(view.mounted) != view.mount:
            raise MigrateError(
                f"the mounts of container {state.id} at {view.mounted.place} have changed while it was moved",
                remedy="move it again",
            )


def _inode(record: bytes) -> int | None:
    """Return the inode in an event's record; None if it has no file, which means that the queue overflowed."""
    if len(record) < _HANDLE.size:
        return None
    kind, _, _, _, size, handle, _, low, high = _HANDLE.unpack_from(record)
    known = (kind, size, handle) == (_INFO_FID, _HANDLE_BYTES, _INO32_GEN)
    return high << 32 | low if known else None


def _suitable(state: State, spec: Spec) -> list[tuple[Mounted, mountinfo.Mount]]:
    """Return the bundle's tmpfs mounts, and those over masked directories, that can be made again elsewhere.

    Each is mounted once, with no mount over or in it, and private.
    """
    # The root of a user namespace owns the file systems that it mounts, which the target cannot reproduce.
    if "user" in spec.namespaces or not _is_one_namespace(state.pid):
        return []
    mounts, leased = mountinfo.read(state.pid), _leased()
    asked = [mount.destination for mount in spec.mounts if mount.type == "tmpfs" and not mount.is_bind]
    found = []
    for destination in [*asked, *spec.masked_paths]:
        place = os.path.normpath("/" + destination.lstrip("/"))
        here = [item for item in mounts if mountinfo.is_below(item.place, place)]
        if len(here) != 1 or here[0].place != place:
            continue
        item, options = here[0], here[0].options.split(",")
        alone = sum(other.device == item.device for other in mounts) == 1
        if (item.fstype, item.root, item.is_private) != ("tmpfs", "/", True) or not alone:
            continue
        if "rw" not in options and destination not in spec.masked_paths:
            continue
        data = ",".join(option for option in options if option != "rw")
        if are_tmpfs_options(data) and item.device not in leased:
            found.append((Mounted(place, data, item.source), item))
    return found[:MOST]


def _leased() -> set[str]:
    """Return the devices with a leased file, because rsync would break the lease by opening the file."""
    found = set()
    with open("/proc/locks") as file:
        for line in file:
            fields = line.split()  # number, kind, state, mode, process, device:inode in hex, ...
            if len(fields) > 5 and fields[1] == "LEASE":
                major, minor, _ = fields[5].split(":")
                found.add(f"{int(major, 16)}:{int(minor, 16)}")
    return found


def _is_one_namespace(init_pid: int) -> bool:
    """Return whether all processes of a container are in one mount namespace."""
    found = set()
    for pid in processes.container_pids(init_pid):
        with contextlib.suppress(OSError):
            found.add(os.stat(f"/proc/{pid}/ns/mnt").st_ino)
    return len(found) == 1


def views(state: State, spec: Spec) -> list[View]:
    """Return views of the mounts that are worth sending ahead: large or empty ones.

    CRIU carries those that cannot be opened or watched.
    """
    if shutil.which("rsync") is None:
        return []
    wanted = [item for item in _suitable(state, spec) if _is_worth_it(f"/proc/{state.pid}/root{item[0].place}", state)]
    found: list[View] = []
    for (mounted, mount), fd in zip(wanted, _open(state.pid, [item.place for item, _ in wanted]), strict=False):
        with contextlib.suppress(OSError):  # Linux before 5.13 lacks this kind of fanotify
            found.append(View(mounted, mount, fd))
    for view in [view for view in found if not view.is_expected]:
        found.remove(view)
        view.close()
    return found


def _is_worth_it(path: str, state: State) -> bool:
    """Return whether a tmpfs is empty; or is large, and the container's memory has room for the copies of rsync."""
    try:
        info = os.statvfs(path)
    except OSError:
        return False
    used = (info.f_blocks - info.f_bfree) * info.f_frsize
    if not used and info.f_files - info.f_ffree <= 1:  # its root
        return True
    return bool(info.f_blocks) and used >= SMALL and 2 * used <= _memory_limit(state.cgroup_paths)


def _memory_limit(cgroups: dict[str, str]) -> float:
    """Return the bytes of memory that a container may use; infinity if it is not limited."""
    path = f"{cgroups['memory']}/memory.limit_in_bytes" if "memory" in cgroups else f"{cgroups.get('')}/memory.max"
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return math.inf
    return math.inf if text == "max" else int(text)


def _open(init_pid: int, places: list[str]) -> list[int]:
    if not places:
        return []
    ours, theirs = socket.socketpair()
    argv = selfexec.command("migrate.files.tmpfs_opener", str(init_pid), str(theirs.fileno()), *places)
    with ours:
        ours.settimeout(TMPFS_OPEN_TIMEOUT)
        with theirs:
            process = subprocess.Popen(
                argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            return list(socket.recv_fds(ours, 1, len(places))[1])
        except OSError:
            return []
        finally:
            process.kill()
            process.wait()
