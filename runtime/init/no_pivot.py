"""The container's root by MS_MOVE and chroot, for a host whose root is its initial ramdisk: pivot_root(2) refuses that.

The host's mounts stay below the new root, out of reach. The kernel counts them nevertheless: as long as there is a proc
or sysfs without covers in the mount namespace, a user namespace inside may mount another one, without the container's
masked and read-only paths (mount_too_revealing() in fs/namespace.c). So they go, all but the ramdisk itself: a program
with CAP_SYS_ADMIN can unmount its root and see that.
"""

from __future__ import annotations

import os

from runtime.light.records import Record
from runtime.linux import syscalls
from runtime.linux.mount_flags import MS_MOVE, MS_PRIVATE, MS_RDONLY, MS_REC

_ESCAPED = ((rb"\040", b" "), (rb"\011", b"\t"), (rb"\012", b"\n"), (rb"\134", b"\\"))  # proc_pid_mountinfo(5)
_REVEALING = ("proc", "sysfs")


class _Mounted(Record):
    """A line of mountinfo; `whole` tells that the file system's own root is what is mounted."""

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
        # What is mounted and unmounted here must not be so at the host.
        syscalls.mount(None, "/", None, MS_PRIVATE)
        if os.getcwd() != "/":  # over the host's root already: mounts.build
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
    """The mount table of an open mountinfo, which outlives the proc that it comes from."""
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
    """Unmount all that is mounted at a path, with what is mounted below it."""
    try:
        while True:
            syscalls.mount(None, path, None, MS_PRIVATE | MS_REC)
            syscalls.umount(path, syscalls.MNT_DETACH)
    except OSError:
        return  # nothing is mounted there now; or a user namespace has inherited it, and must not unmount it


def _cover(table: list[_Mounted], ours: int) -> None:
    """Hide what could not be unmounted; the kernel no longer counts a covered proc for namespaces made inside."""
    parents = {mounted.id: mounted.parent for mounted in table}
    for mounted in table:
        above = mounted.id
        while above != ours and above in parents:
            above = parents[above]
        if above != ours and mounted.whole and mounted.kind in _REVEALING:
            syscalls.mount("tmpfs", mounted.path, "tmpfs", MS_RDONLY, "size=0k")
