"""Give mounts all their flags out of sight, before they are moved to where the container finds them.

A path could lead to another mount point at each step, because a hostile container can rename directories on a volume
that it shares. Every step therefore uses a descriptor, and a mount that must not be seen unfinished is made
- detached: a copy by open_tree(2), which mount_setattr(2) changes;
- or, for mount(2) and kernels before 5.12, on the root itself: a lookup that starts at the root never reaches a mount
  on it, but its ".." does.
"""

from __future__ import annotations

import errno
import os

from runtime.light.records import Record
from runtime.linux import syscalls
from runtime.linux.mount_flags import (
    ATTR_RDONLY,
    MS_BIND,
    MS_NOATIME,
    MS_NOSYMFOLLOW,
    MS_RDONLY,
    MS_REC,
    MS_RELATIME,
    MS_REMOUNT,
    attributes,
)

# Flag of statvfs(3) -> flag of mount(2).
_KEPT = {1: 1, 2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: MS_RELATIME, 8192: MS_NOSYMFOLLOW}


class Change(Record):
    """A change of a mount: flags of mount(2) to set and to clear on the mount itself, attributes of mount_setattr(2) to
    set and to clear in its whole tree, and changes of propagation."""

    flags: int = 0
    cleared: int = 0
    set: int = 0
    clear: int = 0
    propagation: tuple[int, ...] = ()


class Stage:
    """Makes mounts below a root: `root` is an O_PATH descriptor of it, in a mount that others do not share."""

    def __init__(self, root: int) -> None:
        self._root = root

    def new(self, source: str, kind: str, flags: int, data: str | None) -> int:
        """Mount a new file system on the stage; return a descriptor of the mount. Raises OSError."""
        syscalls.mount(source, f"/proc/self/fd/{self._root}", kind, flags, data)
        return syscalls.open_in_root(self._root, "..", os.O_PATH)

    def change(self, tree: int, change: Change, *, staged: bool = False, single: bool = False) -> None:
        """Change a mount that is detached or, if `staged`, on the stage; `single`: no other mount is below it.

        On a kernel that cannot change a detached mount, move it to the stage first. Raises OSError.
        """
        try:
            for to_set, to_clear, recursive, propagation in _calls(change, single=single):
                syscalls.mount_setattr(
                    tree, set=to_set, clear=to_clear, recursive=recursive, propagation=propagation
                )  # fmt: skip
        except OSError as error:
            if error.errno != errno.ENOSYS or change.set or change.clear:
                raise
            if not staged:
                syscalls.move_mount(tree, self._root)
            _change_attached(tree, change)

    def protect(self, fd: int) -> None:
        """Make a mount in its final place read-only. Raises OSError."""
        try:
            syscalls.mount_setattr(fd, set=ATTR_RDONLY, clear=0, recursive=False)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            remount(f"/proc/self/fd/{fd}", MS_RDONLY, 0)


def _change_attached(tree: int, change: Change) -> None:
    """Change a mount without mount_setattr, for Linux 5.6 to 5.11."""
    path = f"/proc/self/fd/{tree}"
    if change.flags or change.cleared:
        remount(path, change.flags, change.cleared)
    for propagation in change.propagation:
        syscalls.mount(None, path, None, propagation)


def _calls(change: Change, *, single: bool) -> list[tuple[int, int, bool, int]]:
    """Return the calls of mount_setattr for a change: (set, clear, recursive, propagation)."""
    found = []
    to_set, to_clear = attributes(change.flags, change.cleared)
    if to_set or to_clear:
        found.append((to_set, to_clear, False, 0))
    if change.set or change.clear:
        found.append((change.set, change.clear, True, 0))
    for kind in change.propagation:
        recursive = bool(kind & MS_REC)
        if found and not found[-1][3] and (single or found[-1][2] == recursive):
            found[-1] = (*found[-1][:3], kind & ~MS_REC)
        else:
            found.append((0, 0, recursive, kind & ~MS_REC))
    return found


def remount(path: str, flags: int, cleared: int) -> None:
    """Change flags of the one mount at `path`; keep the others, as a user namespace must for inherited mounts."""
    there = os.statvfs(path).f_flag
    kept = sum(flag for bit, flag in _KEPT.items() if there & bit) & ~cleared
    if cleared & MS_NOATIME:
        kept |= MS_RELATIME  # without any atime flag the kernel would keep noatime
    syscalls.mount(None, path, None, MS_REMOUNT | MS_BIND | flags | kept)
