"""Find what has changed in a tree since an earlier scan, in one walk, by the times that the kernel keeps.

Programs cannot set a file's ctime, which changes with contents, attributes and links. An entry with the same inode,
ctime, mtime, size and mode need not be sent again. Two cases need more:

- ctime has a tick: a file that was changed just before the scan can change once more and look the same. It counts as
  changed.
- stores to a page that is mapped and already writable do not change any time. Files that a process has mapped so
  `always` count as changed (see `mapped`).
"""

import contextlib
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from runtime.linux import processes

_TICK = 20_000_000  # ns; the coarse clock's step is 1 to 10 ms
_COARSE_TICK = 2_000_000_000  # file systems that keep whole seconds

Entry = tuple[int, int, int, int, int]  # inode, ctime ns, mtime ns, size (0 of a directory), mode


@dataclass(frozen=True)
class Scan:
    """The entries of a tree at one time. Paths are relative to its root, as bytes; the root itself is b"."."""

    started_ns: int
    entries: dict[bytes, Entry] = field(repr=False)

    def since(self, earlier: "Scan", always: Iterable[int] = ()) -> list[bytes]:
        """Return the names to send, or remove, to update a copy made at `earlier`; `always`: inodes to send anyway."""
        inodes, before = frozenset(always), earlier.entries
        fine, coarse = earlier.started_ns - _TICK, earlier.started_ns - _COARSE_TICK
        names = [
            path
            for path, entry in self.entries.items()
            if before.get(path) != entry
            or entry[1] >= (fine if entry[1] % 1_000_000_000 else coarse)
            or entry[0] in inodes
        ]
        return names + [path for path in before if path not in self.entries and self._is_in_directory(path)]

    def _is_in_directory(self, path: bytes) -> bool:
        """Return whether a vanished entry's directory still exists.

        Otherwise the entry is removed with its directory, and rsync would follow a link in the directory's place.
        """
        parent = self.entries.get(path.rpartition(b"/")[0] or b".")
        return stat.S_ISDIR(parent[4]) if parent is not None else b"." not in self.entries

    def with_names(self, names: Iterable[bytes]) -> "Scan":
        """Return the scan with further names, of unknown entries, which count as changed or gone next time."""
        unknown: dict[bytes, Entry] = {name: (0, 0, 0, 0, 0) for name in names if name not in self.entries}
        return Scan(self.started_ns, self.entries | unknown) if unknown else self

    def bytes_of(self, names: Iterable[bytes]) -> int:
        """Return the total size of those of `names` that are regular files now."""
        found = (self.entries.get(name) for name in names)
        return sum(entry[3] for entry in found if entry is not None and stat.S_ISREG(entry[4]))


def scan(
    root: str, *, one_file_system: bool = False, single: bool = False, until: Callable[[], float] = lambda: math.inf
) -> Scan:
    """Scan every entry below `root`, or with `single` the one file `root`, named as in its directory.

    An entry that vanishes meanwhile is left out; if the root does, raise OSError. Raises TimeoutError after `until`, a
    time.monotonic().
    """
    started = time.clock_gettime_ns(time.CLOCK_REALTIME)
    base = os.fsencode(root)
    top = os.lstat(base)
    if single:
        return Scan(started, {os.path.basename(base): _entry(top)})
    entries: dict[bytes, Entry] = {b".": _entry(top)}
    skip = len(base.rstrip(b"/")) + 1
    pending = [(base.rstrip(b"/") or b"/", top.st_dev, top.st_ino)]
    while pending:
        _check_time(until)
        directory, *seen = pending.pop()
        with _opened(directory, seen) as listing:
            for item in listing:
                try:
                    info = item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                path = directory.rstrip(b"/") + b"/" + os.fsencode(item.name)
                if stat.S_ISDIR(info.st_mode):
                    entries[path[skip:]] = (info.st_ino, info.st_ctime_ns, info.st_mtime_ns, 0, info.st_mode)
                    if not one_file_system or info.st_dev == top.st_dev:
                        pending.append((path, info.st_dev, info.st_ino))
                else:
                    entries[path[skip:]] = (
                        info.st_ino, info.st_ctime_ns, info.st_mtime_ns, info.st_size, info.st_mode
                    )  # fmt: skip
    return Scan(started, entries)


def _check_time(until: Callable[[], float]) -> None:
    if time.monotonic() > until():
        raise TimeoutError("scanning the tree took too long")


@contextlib.contextmanager
def _opened(directory: bytes, seen: list[int]) -> Iterator[Iterable[os.DirEntry[str]]]:
    """Yield a directory's entries; none if another directory, or a link out of the tree, is in its place by now."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield ()
        return
    try:
        info = os.fstat(fd)
        if [info.st_dev, info.st_ino] == seen:
            with os.scandir(fd) as listing:
                yield listing
        else:
            yield ()
    finally:
        os.close(fd)


def _entry(info: os.stat_result) -> Entry:
    size = 0 if stat.S_ISDIR(info.st_mode) else info.st_size
    return info.st_ino, info.st_ctime_ns, info.st_mtime_ns, size, info.st_mode


def again(root: str, before: Scan, until: Callable[[], float] = lambda: math.inf) -> Scan:
    """Scan again only the directories whose time has changed, when at most a few names can be new.

    During a dump CRIU gives new names to open files that were deleted. It also makes a directory for a moment, where it
    mounts what another mount covers (criu/mount.c, get_clean_mnt): what the scan before has seen of that is gone.
    """
    base, settled = os.fsencode(root), before.started_ns - _TICK
    entries = dict(before.entries)
    listed: dict[bytes, set[bytes]] = {}
    for path, entry in before.entries.items():
        if not stat.S_ISDIR(entry[4]):
            continue
        _check_time(until)
        directory = base if path == b"." else base + b"/" + path
        try:
            now = _entry(os.lstat(directory))
            if now == entry and entry[1] < settled:
                continue
            entries[path] = now
            names = set()
            with os.scandir(directory) as listing:
                for item in listing:
                    name = item.name if path == b"." else path + b"/" + item.name
                    entries[name] = _entry(item.stat(follow_symlinks=False))
                    names.add(name)
            listed[path] = names
        except (FileNotFoundError, NotADirectoryError):
            continue
    return Scan(before.started_ns, _without_vanished(entries, listed))


def _without_vanished(entries: dict[bytes, Entry], listed: dict[bytes, set[bytes]]) -> dict[bytes, Entry]:
    """Return the entries without those that a list of their directory lacks, and without what was in them."""
    gone = {
        path
        for path in entries
        if path != b"." and (names := listed.get(path.rpartition(b"/")[0] or b".")) is not None and path not in names
    }
    if not gone:
        return entries
    return {path: entry for path, entry in entries.items() if gone.isdisjoint(_and_above(path))}


def _and_above(path: bytes) -> Iterator[bytes]:
    """Yield a path and the directories above it, but the root."""
    while path:
        yield path
        path = path.rpartition(b"/")[0]


def open_for_both(init_pid: int, device: int) -> set[int]:
    """Return the inodes of a device's files that a container's processes have open for reading and writing."""
    found: set[int] = set()
    for pid in processes.container_pids(init_pid):
        with contextlib.suppress(OSError):  # it has exited
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):  # it has closed it
                    info = os.stat(f"/proc/{pid}/fd/{number}")
                    if info.st_dev == device and stat.S_ISREG(info.st_mode) and _is_for_both(pid, number):
                        found.add(info.st_ino)
    return found


def _is_for_both(pid: int, number: str) -> bool:
    with open(f"/proc/{pid}/fdinfo/{number}") as file:
        flags = next(line for line in file if line.startswith("flags:"))
    return int(flags.split()[1], 8) & os.O_ACCMODE == os.O_RDWR


def mapped(init_pid: int) -> set[int]:
    """Return the inodes of files that a container's processes have mapped shared and writable."""
    found: set[int] = set()
    for pid in processes.container_pids(init_pid):
        try:
            with open(f"/proc/{pid}/maps", "rb") as file:
                for line in file:
                    fields = line.split(None, 5)
                    if len(fields) > 5 and fields[1][1:2] == b"w" and fields[1][3:4] == b"s":
                        found.add(os.stat(b"/proc/%d/map_files/%s" % (pid, fields[0])).st_ino)
        except OSError:
            continue  # it has exited, or unmapped the file
    return found
