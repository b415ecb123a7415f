"""Change the root by MS_MOVE and chroot, on a host whose root is its initial ramdisk, which pivot_root(2) rejects.

The host's mounts stay below the new root, out of reach. The kernel counts them nevertheless: while the mount namespace
has a proc or sysfs without covers, a user namespace inside may mount another one, without the container's masked and
read-only paths (mount_too_revealing() in fs/namespace.c). This module therefore unmounts or covers all of them but the
ramdisk itself, which a program with CAP_SYS_ADMIN can see by unmounting its root.
"""

from __future__ import annotations

import os

from runtime.light.records import Record
from runtime.linux import syscalls
from runtime.linux.mount_flags import MS_MOVE, MS_PRIVATE, MS_RDONLY, MS_REC

_ESCAPED = ((rb"\040", b" "), (rb"\011", b"\t"), (rb"\012", b"\n"), (rb"\134", b"\\"))  # proc_pid_mountinfo(5)
_REVEALING = ("proc", "sysfs")


class _Mounted(Record):
    """A line of mountinfo; `whole`: the root of the file system is mounted, not a directory below it."""

    id: int
    parent: int
    path: bytes
    kind: str
    whole: bool


def enter(old: int) -> None:
    """Make the working directory the root. `old` is an O_PATH descriptor of the host's root. Raises OSError."""
    new = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        ours, theirs = _mount_id(new), _mount_id(old)
        # Mounting and unmounting here must not reach the host.
        syscalls.mount(None, "/", None, MS_PRIVATE)
        if os.getcwd() != "/":  # else mounts.build has mounted it over the host's root already
            syscalls.mount(".", "/", None, MS_MOVE)
        for mounted in _read(table):
            if mounted.parent == theirs and mounted.id != ours:
                _detach(mounted.path)
        _cover(_read(table), ours)
        os.chroot(".")
    finally:
        os.close(table)
        os.close(new)


def _mount_id(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))


def _read(table: int) -> list[_Mounted]:
    """Return the mount table from an open mountinfo, which stays readable after its proc is unmounted."""
    os.lseek(table, 0, os.SEEK_SET)
    text = b""
    while part := os.read(table, 1 << 16):
        text += part
    found = []
    for line in text.splitlines():
        fields = line.split(b" ")
        path = fields[4]
        for escape, character in _ESCAPED:
            path = path.replace(escape, character)
        kind = fields[fields.index(b"-") + 1].decode()
        found.append(_Mounted(int(fields[0]), int(fields[1]), path, kind, fields[3] == b"/"))
    return found


def _detach(path: bytes) -> None:
    """Unmount everything that is mounted at a path and below it."""
    try:
        while True:
            syscalls.mount(None, path, None, MS_PRIVATE | MS_REC)
            syscalls.umount(path, syscalls.MNT_DETACH)
    except OSError:
        return  # nothing is mounted there now; or a user namespace has inherited the mount and may not unmount it


def _cover(table: list[_Mounted], ours: int) -> None:
    """Cover each proc and sysfs that could not be unmounted; the kernel ignores covered ones in its check."""
    parents = {mounted.id: mounted.parent for mounted in table}
    for mounted in table:
        above = mounted.id
        while above != ours and above in parents:
            above = parents[above]
        if above != ours and mounted.whole and mounted.kind in _REVEALING:
            syscalls.mount("tmpfs", mounted.path, "tmpfs", MS_RDONLY, "size=0k")
