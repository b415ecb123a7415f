"""Capabilities: names, numbers (linux/capability.h) and setting the five sets of this thread."""

import os
from collections.abc import Iterable
from pathlib import Path

from runtime import syscalls

SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")

_NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)
NUMBERS = {f"CAP_{name}": number for number, name in enumerate(_NAMES.split())}


def mask(names: Iterable[str]) -> int:
    return sum(1 << NUMBERS[name] for name in names)


def held() -> int:
    """The permitted set of this process, as a bit mask."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0


def drop_bounding(keep: frozenset[str]) -> None:
    """Leave only `keep` in the bounding set. Needs CAP_SETPCAP, so it comes before the user is changed."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for number in range(last + 1):
        if not mask(keep) >> number & 1:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)


def apply(sets: dict[str, frozenset[str]]) -> None:
    """Set effective, permitted, inheritable and ambient, as far as this process holds them itself.

    A capability that we lack cannot be given; runc leaves such ones out as well.
    """
    ours = held()
    syscalls.capset(
        mask(sets["effective"]) & ours, mask(sets["permitted"]) & ours, mask(sets["inheritable"]) & ours
    )  # fmt: skip
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    wanted = mask(sets["ambient"]) & mask(sets["permitted"]) & mask(sets["inheritable"]) & ours
    for number in range(wanted.bit_length()):
        if wanted >> number & 1:
            syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, number)


def keep_over_setuid() -> None:
    """Do not lose the permitted set when the uid changes from 0; cleared by the next exec."""
    syscalls.prctl(syscalls.PR_SET_KEEPCAPS, 1)


def become(uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Change to a user and its groups for good."""
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
