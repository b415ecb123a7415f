"""Find what a container's processes hold that CRIU cannot carry, from /proc. Processes may exit meanwhile."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from migrate.files import mountinfo
from migrate.memory import shared_objects
from migrate.preflight import silent_losses, special_files
from migrate.preflight.rules import Blocker
from migrate.preflight.watches import LINKS, Watches
from runtime.checkpoint.options import GHOST_LIMIT
from runtime.linux import processes, syscalls

# Character devices that CRIU dumps (criu/files.c, criu/files-ext.c): memory devices, tun.
_MEM_MAJOR, _MISC_MAJOR, _TUN_MINOR = 1, 10, 200
_MEM_MINORS = frozenset((3, 5, 7, 8, 9))
_SLAVE_MAJORS = range(136, 144)
_TTY, _PTMX = (5, 0), (5, 2)
# Anonymous inodes that CRIU dumps (criu/files.c, dump_one_file).
_ANON_KNOWN = re.compile(r"anon_inode:(\[?(eventfd|eventpoll|signalfd|timerfd|pidfd)\]?|inotify|\[fanotify\])$")
# Memory that is a file only inside the kernel; CRIU carries it as memory.
_MEMORY = ("/memfd:", "/dev/zero ", "/SYSV", "/anon_hugepage ", "/secretmem ")


def scan(init_pid: int) -> list[Blocker]:
    """Return all blockers about the processes in the pid namespace of `init_pid`, and in those below it."""
    found: list[Blocker] = []
    family = processes.descendants(init_pid)
    inside = sorted({*processes.container_pids(init_pid), *family})
    mounts = mountinfo.ids(init_pid)
    terminals = _Terminals(init_pid, family)
    ghosts = _Ghosts()
    with Watches(init_pid) as watches:
        for pid in inside:
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                subject = f"process {pid} ({name})"
                if pid not in family and not _is_related(pid, family):
                    text = f"was started by `exec`{_client(pid, set(inside))}: CRIU would not dump it, and it would die"
                    found.append(Blocker("exec-session", subject, text))
                    continue
                found += _status(pid, init_pid, subject)
                found += silent_losses.of_process(pid, init_pid, subject)
                found += _descriptors(pid, subject, mounts, terminals, ghosts, watches)
                found += ghosts.mapped(pid, subject)
            except OSError:
                continue
    return found


def _is_related(pid: int, family: set[int]) -> bool:
    """Return whether a process descends from the family after all, because it was forked after the family was listed.

    Raises OSError if it has exited.
    """
    while True:
        ancestor = pid
        try:
            while ancestor > 1:
                ancestor = _parent(ancestor)
                if ancestor in family:
                    return True
            return False
        except OSError:
            os.stat(f"/proc/{pid}")  # an ancestor has exited: the process has another parent now


def _client(pid: int, inside: set[int]) -> str:
    """Return pid and command line of the process outside that waits for a process started by `exec`, in brackets."""
    try:
        while pid in inside:
            pid = _parent(pid)
        client = _parent(pid)  # the process in between is part of `exec` itself
        words = Path(f"/proc/{client}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
    except (OSError, ValueError):
        return ""
    return f" (by process {client}: {words.decode(errors='replace')[-80:]})" if client > 1 else ""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _status(pid: int, init_pid: int, subject: str) -> Iterator[Blocker]:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    if fields.get("State", "").strip().startswith("Z") and int(fields.get("Threads", "1")) > 1:
        yield Blocker(
            "ended-thread", subject, "has lost its first thread while others still run: CRIU cannot carry that"
        )
    if fields.get("TracerPid", "0").strip() != "0":
        yield Blocker("traced", subject, f"is traced by process {fields['TracerPid'].strip()}")
    # This host's root has all capabilities in a user namespace that it has made.
    if os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user"):
        for kind in ("Uid", "Gid"):
            if others := set(fields.get(kind, "").split()) - {"0"}:
                text = f"runs as {kind.lower()} {min(others, key=int)}"
                yield Blocker(
                    "other-uid", subject, f"{text}: CRIU lacks CAP_SYS_RESOURCE on this host to read its limits"
                )
                break
    elif pid == init_pid and not _is_visible_inside(pid, fields):
        yield Blocker(
            "user-changed", subject, "has changed its user and was restored before: CRIU cannot read it again"
        )


def _is_visible_inside(pid: int, fields: dict[str, str]) -> bool:
    """Return whether the root of its user namespace may read a process, as the part of CRIU does that runs in there.

    A process that has changed its user is hidden until it executes another program (PR_SET_DUMPABLE), except from the
    root of the namespace in which it executed its program. For a restored process that is the host's root, because its
    program was CRIU.
    """
    owner = os.stat(f"/proc/{pid}/fd").st_uid  # of a hidden process: that root
    maps = [line.split() for line in Path(f"/proc/{pid}/uid_map").read_text().splitlines()]
    root = next((int(outside) for inside, outside, _ in maps if inside == "0"), owner)
    return owner == root or str(owner) in fields.get("Uid", "").split()


class _Terminals:
    """The terminals of the container's devpts whose master one of its processes holds, and its console."""

    def __init__(self, init_pid: int, family: set[int]) -> None:
        self.devices: set[str] = set()
        self.inside: set[int] = set()
        self._console = -1
        try:
            lines = Path(f"/proc/{init_pid}/mountinfo").read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            fields, _, after = line.partition(" - ")
            _, _, device, root, place = fields.split()[:5]
            if after.startswith("devpts "):
                self.devices.add(device)
                if place == "/dev/console" and root[1:].isdigit():
                    self._console = int(root[1:])
        for pid in family:
            self.inside.update(_masters(pid))

    def problem(self, info: os.stat_result, link: str) -> str | None:
        """Return why a slave cannot be carried; None if it can. For the console the rule "terminal" decides."""
        number = os.minor(info.st_rdev) + (os.major(info.st_rdev) - _SLAVE_MAJORS[0]) * 256
        if mountinfo.device(info) not in self.devices:
            return f"is the host's terminal {link}"
        if number in self.inside or number == self._console:
            return None
        return f"is the terminal {link}, whose other end is outside the container"


def _masters(pid: int) -> Iterator[int]:
    """Yield the numbers of the terminals whose masters a process holds."""
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            device = os.stat(f"/proc/{pid}/fd/{number}").st_rdev
            if (os.major(device), os.minor(device)) == _PTMX:
                for line in Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines():
                    if line.startswith("tty-index:"):
                        yield int(line.split()[1])
    except OSError:
        return


class _Ghosts:
    """Deleted files that are too large to go with the images; each is reported once."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    def look(self, info: os.stat_result, link: str, where: str) -> Iterator[Blocker]:
        size = info.st_blocks * 512  # CRIU compares this size too
        if not stat.S_ISREG(info.st_mode) or info.st_nlink or size <= GHOST_LIMIT or link.startswith(_MEMORY):
            return
        if (info.st_dev, info.st_ino) not in self._seen:
            self._seen.add((info.st_dev, info.st_ino))
            limit = f"CRIU carries such a file up to {GHOST_LIMIT >> 20} MiB"
            yield Blocker("ghost-file", where, f"{link} was deleted and has {size >> 20} MiB: {limit}")

    def mapped(self, pid: int, subject: str) -> Iterator[Blocker]:
        """Yield those that are mapped, because their descriptors may be closed."""
        with open(f"/proc/{pid}/maps", errors="surrogateescape") as file:
            lines = [line.split(None, 5) for line in file if line.endswith(" (deleted)\n")]
        for place, *_, path in lines:
            try:
                start, end = (int(address, 16) for address in place.split("-"))
                info = os.stat(f"/proc/{pid}/map_files/{start:x}-{end:x}")
            except OSError:
                continue
            yield from self.look(info, path.strip(), f"{subject}, mapped at {place}")


def _descriptors(
    pid: int, subject: str, mounts: set[int], terminals: _Terminals, ghosts: _Ghosts, watches: Watches
) -> Iterator[Blocker]:
    for number in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
        place = f"{subject}, descriptor {number}"
        try:
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            info = os.stat(f"/proc/{pid}/fd/{number}")
        except OSError:
            continue
        yield from ghosts.look(info, link, place)
        blocker = silent_losses.of_descriptor(pid, number, link, place)
        if blocker is not None:
            yield blocker
        elif link in LINKS:
            yield from watches.look(pid, number, place)
        elif link.startswith("anon_inode:"):
            if link == "anon_inode:[io_uring]":
                yield Blocker("io-uring", place, "is an io_uring, which CRIU cannot carry")
            elif not _ANON_KNOWN.match(link):
                yield Blocker("special-file", place, f"is {link}, which CRIU cannot carry", special_files.remedy(link))
        elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
            blocker = _device(info, link, place, terminals)
            if blocker is not None:
                yield blocker
            elif path := _foreign(pid, int(number), mounts):
                yield Blocker("host-file", place, f"is {path} of the host, opened outside the container's mounts")
        elif link.startswith("/memfd:"):
            if not silent_losses.is_memfd(info.st_dev):
                text = "is a memfd with huge pages, which CRIU cannot carry"
                yield Blocker("special-file", place, text, special_files.remedy("hugepages"))
        elif link.startswith("/") and (path := _foreign(pid, int(number), mounts)):
            if silent_losses.is_message_queue(pid, number):
                continue  # silent_losses.ipc reports it
            yield Blocker("host-file", place, f"is {path} of the host, opened outside the container's mounts")


def _device(info: os.stat_result, link: str, place: str, terminals: _Terminals) -> Blocker | None:
    major, minor = os.major(info.st_rdev), os.minor(info.st_rdev)
    if stat.S_ISBLK(info.st_mode):
        return Blocker("device", place, f"is the block device {link}")
    if major in _SLAVE_MAJORS:
        problem = terminals.problem(info, link)
        return Blocker("host-file", place, problem) if problem else None
    if (major, minor) in (_TTY, _PTMX):
        return None
    if (major == _MEM_MAJOR and minor in _MEM_MINORS) or (major, minor) == (_MISC_MAJOR, _TUN_MINOR):
        return None
    return Blocker("device", place, f"is the device {link} ({major}:{minor}), which CRIU cannot carry")


def _foreign(pid: int, number: int, mounts: set[int]) -> str:
    """Return the path of a descriptor's file if it was opened outside these mounts, else "".

    This reads a duplicate, because the process may reuse the number at any time, as a shell does for `echo > FILE`.
    """
    try:
        fd = syscalls.duplicate(pid, number)
    except OSError:
        return ""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    ids = {int(line.split()[1]) for line in lines if line.startswith("mnt_id:")}
    return path if path.startswith("/") and not ids & mounts else ""


def network_devices(pid: int) -> list[str]:
    """Return the interfaces of the process's network namespace other than loopback."""
    try:
        lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    except OSError:
        return []
    return [name for name in (line.partition(":")[0].strip() for line in lines) if name != "lo"]


def memory_bytes(init_pid: int) -> int:
    """Return an upper estimate of the images' size in bytes: anonymous and shared memory of all processes, tmpfs."""
    total = shared_objects.size(init_pid)
    for pid in processes.container_pids(init_pid):
        try:
            fields = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue
        kinds = ("RssAnon:", "VmSwap:")
        total += sum(int(line.split()[1]) << 10 for line in fields if line.startswith(kinds))
    return total + _tmpfs_bytes(init_pid)


def _tmpfs_bytes(pid: int) -> int:
    """Return the bytes in the container's tmpfs mounts, which go with the images."""
    total, seen = 0, set()
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        fields, _, after = line.partition(" - ")
        device, root, place = fields.split()[2:5]
        if after.startswith("tmpfs ") and root == "/" and device not in seen:
            seen.add(device)
            try:
                usage = os.statvfs(f"/proc/{pid}/root{place}")
            except OSError:
                continue
            total += (usage.f_blocks - usage.f_bfree) * usage.f_frsize
    return total
