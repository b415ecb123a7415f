"""Convert between names and numbers of capabilities (linux/capability.h)."""

from __future__ import annotations

from runtime import notices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")

NONE: dict[str, frozenset[str]] = dict.fromkeys(SETS, frozenset())

_NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)
_UNKNOWN = 64  # beyond all numbers that the kernel can have
NUMBERS = {f"CAP_{name}": number for number, name in enumerate(_NAMES.split())}


def mask(names: Iterable[str]) -> int:
    """Return the bit mask of a set of names; unknown names are left out."""
    result = 0
    for name in names:
        if name in NUMBERS:
            result |= 1 << NUMBERS[name]
    return result


def names(mask: int) -> list[str]:
    """Return the names of a bit mask's capabilities; unknown numbers are left out."""
    return [name for name, number in NUMBERS.items() if mask >> number & 1]


def warn(sets: dict[str, frozenset[str]] | None, *, remapped: bool) -> None:
    """Warn of capabilities that a bundle asks for and its program does not get (runtime-spec, config.md: not an error).

    `remapped`: the container has a user namespace, in which its root has all capabilities.
    """
    wanted = frozenset[str]().union(*(sets or {}).values())
    if not wanted:
        return
    held = 2**_UNKNOWN - 1 if remapped else permitted()
    left_out = sorted(name for name in wanted if not held >> NUMBERS.get(name, _UNKNOWN) & 1)
    if left_out:
        notices.warn(f"process.capabilities: left out, because this host lacks them: {', '.join(left_out)}")


def permitted() -> int:
    """Return the permitted set of this process, as a bit mask."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("CapPrm:"):
                return int(line.split()[1], 16)
    return 0
