"""The flags of mount(2) and attributes of mount_setattr(2) (linux/mount.h)."""

from __future__ import annotations

# mount(2), linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC = (
    1, 2, 4, 8, 16, 32, 64, 128,
)  # fmt: skip


MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_MOVE, MS_REC, MS_SILENT = (
    256, 1024, 2048, 4096, 8192, 16384, 32768,
)  # fmt: skip


MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20


MS_RELATIME, MS_I_VERSION, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 23, 1 << 24, 1 << 25


# mount_setattr(2)
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8


ATTR_ATIME, ATTR_NOATIME, ATTR_STRICTATIME, ATTR_NODIRATIME = 0x70, 0x10, 0x20, 0x80


ATTR_IDMAP, ATTR_NOSYMFOLLOW = 0x00100000, 0x00200000


# Flag of mount(2) -> attribute; without the access-time modes, which are values of one field (see `attributes`).
_ATTRIBUTES = {
    MS_RDONLY: ATTR_RDONLY, MS_NOSUID: ATTR_NOSUID, MS_NODEV: ATTR_NODEV, MS_NOEXEC: ATTR_NOEXEC,
    MS_NODIRATIME: ATTR_NODIRATIME, MS_NOSYMFOLLOW: ATTR_NOSYMFOLLOW,
}  # fmt: skip


def attributes(flags: int, cleared: int) -> tuple[int, int]:
    """Return what mount_setattr(2) must set and clear to have the effect of setting and clearing flags of mount(2)."""
    to_set = sum(attribute for flag, attribute in _ATTRIBUTES.items() if flags & flag)
    to_clear = sum(attribute for flag, attribute in _ATTRIBUTES.items() if cleared & flag)
    if flags & (MS_NOATIME | MS_RELATIME | MS_STRICTATIME) or cleared & MS_NOATIME:
        strict = flags & MS_STRICTATIME  # it overrides the other modes
        to_set |= ATTR_STRICTATIME if strict else ATTR_NOATIME if flags & MS_NOATIME else 0
        to_clear |= ATTR_ATIME
    return to_set, to_clear
