"""Correct the timers (timerfd_create(2)) that CRIU restores wrongly: note them in the freeze, set them at the restore.

CRIU relies on fdinfo alone (criu/timerfd.c). But a periodic timer that has expired and has not been read yet shows no
time left there (the kernel continues to count at the read), and would be restored as disarmed. And CRIU drops the
fraction of a second of a timer that was set by absolute time, which would expire too early.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time

from runtime.errors import ContainerError
from runtime.linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ABSOLUTE, _CANCEL_ON_SET = 1, 2  # TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET
_WALL_CLOCKS = (0, 8)  # CLOCK_REALTIME, CLOCK_REALTIME_ALARM
_SET_TICKS = 0x40085400  # TFD_IOC_SET_TICKS
_BILLION = 1_000_000_000
_LARGEST = (1 << 64) - 1  # of ticks; the kernel limits nanoseconds to 2^63 - 1 (KTIME_MAX)
_FIELDS = {"process", "fd", "ticks", "value", "interval", "absolute"}
_NEWER = {"cancel"}  # not in older images
_MOST = 100_000


def save(pids: dict[int, int]) -> list[dict[str, int]]:
    """Return the timers of these processes (ids here -> inside) that need correction; times in nanoseconds."""
    found = []
    for pid, inside in pids.items():
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue  # a zombie
        for number in numbers:
            try:
                if os.readlink(f"/proc/{pid}/fd/{number}") == "anon_inode:[timerfd]":
                    noted = _note(pid, int(number))
                    if noted is not None:
                        found.append({"process": inside, "fd": int(number), **noted})
            except OSError:
                continue
    return found


def _note(pid: int, number: int) -> dict[str, int] | None:
    clock, flags, ticks, value, interval = _describe(pid, number)
    if ticks and interval and not value:
        # When asked for the time left, the kernel counts the missed expirations and restarts the timer.
        pidfd = os.pidfd_open(pid)
        try:
            fd = syscalls.pidfd_getfd(pidfd, number)
        finally:
            os.close(pidfd)
        try:
            syscalls.timerfd_gettime(fd)
        finally:
            os.close(fd)
        clock, flags, ticks, value, interval = _describe(pid, number)
    elif not flags & _ABSOLUTE or not value:
        return None
    absolute = flags & _ABSOLUTE and clock in _WALL_CLOCKS
    return {
        "ticks": ticks, "interval": interval, "absolute": int(bool(absolute)),
        "value": value + time.time_ns() if absolute else max(value, 1),
        "cancel": int(bool(absolute and flags & _CANCEL_ON_SET)),
    }  # fmt: skip


def _describe(pid: int, number: int) -> tuple[int, int, int, int, int]:
    """Return clock, flags, expirations, and time left and interval in nanoseconds (proc(5), fdinfo)."""
    with open(f"/proc/{pid}/fdinfo/{number}") as file:
        fields = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in file)}

    def nanoseconds(name: str) -> int:
        seconds, _, rest = fields[name].strip("()").partition(",")
        return int(seconds) * _BILLION + int(rest)

    return (
        int(fields["clockid"]), int(fields["settime flags"], 8), int(fields["ticks"]), nanoseconds("it_value"),
        nanoseconds("it_interval"),
    )  # fmt: skip


def check(noted: list[Any]) -> None:
    """Raise ContainerError unless `save` could have made this list."""
    for entry in noted[:_MOST]:
        if not isinstance(entry, dict) or set(entry) - _NEWER != _FIELDS:
            raise ContainerError("timers: an entry is malformed")
        if not all(type(number) is int and 0 <= number <= _LARGEST for number in entry.values()):
            raise ContainerError("timers: an entry holds a value that is not a number from 0 to 2^64 - 1")
    if len(noted) > _MOST:
        raise ContainerError(f"timers: more than {_MOST}")


def restore(noted: list[dict[str, int]], outside: dict[int, int]) -> None:
    """Set the timers of a restored tree that does not run yet; `outside` maps ids inside to ids here."""
    for entry in noted:
        try:
            pidfd = os.pidfd_open(outside[entry["process"]])
            try:
                fd = syscalls.pidfd_getfd(pidfd, entry["fd"])
            finally:
                os.close(pidfd)
            try:
                flags = bool(entry["absolute"]) * _ABSOLUTE | bool(entry.get("cancel")) * _CANCEL_ON_SET
                syscalls.timerfd_settime(fd, flags, entry["value"], entry["interval"])
                if entry["ticks"]:
                    fcntl.ioctl(fd, _SET_TICKS, entry["ticks"].to_bytes(8, sys.byteorder))
            finally:
                os.close(fd)
        except (OSError, KeyError) as error:
            where = f"descriptor {entry['fd']} of process {entry['process']}"
            raise ContainerError(f"the timer that is {where} of the container cannot be set: {error}") from None
