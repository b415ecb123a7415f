"""Whether memory can come into a restored container after it has been resumed, and whether that is wise."""

import contextlib
import functools
import os

from migrate.memory import uffd
from runtime.linux import processes

_UNPRIVILEGED = "/proc/sys/vm/unprivileged_userfaultfd"
_SHARED = 64 << 20  # bytes that processes may share by fork before an eager restore is better


@functools.cache
def problem() -> str:
    """Return why this host cannot restore lazily, "" if it can."""
    try:
        fd = uffd.create()
    except OSError as error:
        return f"userfaultfd cannot be used: {error.strerror}"
    try:
        uffd.enable(fd, uffd.EVENTS)  # as CRIU does
    except OSError as error:
        return f"userfaultfd does not report events: {error.strerror}"
    finally:
        os.close(fd)
    return ""


def is_for_everybody() -> bool:
    """Return whether processes in a user namespace may use userfaultfd: CRIU makes one in there."""
    try:
        with open(_UNPRIVILEGED) as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def shared_by_fork(init: int) -> str:
    """Return why lazily restored memory would take much more room than it takes now, "" if it would not.

    Processes that were forked share pages that none of them has written. A lazy restore gives each its own copy.
    """
    total = shared = 0
    for pid in processes.descendants(init):
        with contextlib.suppress(OSError):
            fields = _rollup(pid)
            total += fields.get("Anonymous", 0)
            shared += fields.get("Anonymous", 0) - fields.get("Pss_Anon", 0)
    if shared > max(_SHARED, total // 10):
        return f"its processes share {shared >> 20} MiB of memory since they were forked"
    return ""


def _rollup(pid: int) -> dict[str, int]:
    """Return the sums over all mappings of a process, in bytes. Raises OSError."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        lines = [line.split() for line in file][1:]
    return {name.rstrip(":"): int(value) << 10 for name, value, *_ in lines}
