"""Read what a cgroup uses, in the shape of `runc events --stats`, and when the kernel runs out of memory in it.

What the kernel does not tell is left out or 0, as runc does it; "no limit" is 2^64 - 1. Times in nanoseconds, sizes in
bytes.
"""

from __future__ import annotations

import errno
import os
import select
import time

from runtime.errors import ContainerError
from runtime.linux.files import flat_keyed, read, read_again

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from runtime.cgroups.cgroup import Cgroup

_UNLIMITED = 2**64 - 1
_TICKS = 10**9 // os.sysconf("SC_CLK_TCK")  # nanoseconds in one tick of cpuacct.stat
_ALIVE_INTERVAL = 1.0
_GONE = (errno.ENOENT, errno.ENODEV)  # the cgroup has been removed, because its container has exited
# A key of runc's blkio, and the version 1 files that may have it: BFQ's, then those of all schedulers.
_V1_IO = {
    "ioServiceBytesRecursive": ("blkio.bfq.io_service_bytes_recursive", "blkio.throttle.io_service_bytes_recursive"),
    "ioServicedRecursive": ("blkio.bfq.io_serviced_recursive", "blkio.throttle.io_serviced_recursive"),
    "ioQueueRecursive": ("blkio.bfq.io_queued_recursive", "blkio.io_queued_recursive"),
    "ioServiceTimeRecursive": ("blkio.bfq.io_service_time_recursive", "blkio.io_service_time_recursive"),
    "ioWaitTimeRecursive": ("blkio.bfq.io_wait_time_recursive", "blkio.io_wait_time_recursive"),
    "ioMergedRecursive": ("blkio.bfq.io_merged_recursive", "blkio.io_merged_recursive"),
    "ioTimeRecursive": ("blkio.bfq.time_recursive", "blkio.time_recursive"),
    "sectorsRecursive": ("blkio.bfq.sectors_recursive", "blkio.sectors_recursive"),
}
_V1_CPUSET = (
    "cpu_exclusive", "mem_exclusive", "mem_hardwall", "memory_migrate", "memory_pressure", "memory_spread_page",
    "memory_spread_slab", "sched_load_balance", "sched_relax_domain_level",
)  # fmt: skip


class _Files:
    """The files of one directory. A missing file reads as empty."""

    def __init__(self, directory: str | None) -> None:
        self.directory = directory

    def text(self, name: str) -> str:
        if self.directory is None:
            return ""
        try:
            return read(f"{self.directory}/{name}")
        except OSError:
            return ""

    def number(self, name: str) -> int:
        text = self.text(name)
        return _UNLIMITED if text == "max" else int(text) if text.removeprefix("-").isdecimal() else 0

    def keyed(self, name: str) -> dict[str, int]:
        return flat_keyed(self.text(name))


def stats(paths: Mapping[str, str]) -> dict[str, Any]:
    """Return the usage as JSON values; `paths` as in Cgroup."""
    if set(paths) == {""}:
        return _v2(_Files(paths[""]))
    return _v1(
        {name: _Files(paths.get(name)) for name in ("cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "hugetlb")}
    )


def _v1(files: Mapping[str, _Files]) -> dict[str, Any]:
    cpu, account, memory = files["cpu"].keyed("cpu.stat"), files["cpuacct"], files["memory"]
    raw, split = memory.keyed("memory.stat"), account.keyed("cpuacct.stat")
    return {
        "cpu": {
            "usage": {
                "total": account.number("cpuacct.usage"),
                "percpu": [int(part) for part in account.text("cpuacct.usage_percpu").split()],
                "percpu_kernel": [int(part) for part in account.text("cpuacct.usage_percpu_sys").split()],
                "percpu_user": [int(part) for part in account.text("cpuacct.usage_percpu_user").split()],
                "kernel": split.get("system", 0) * _TICKS,
                "user": split.get("user", 0) * _TICKS,
            },
            "throttling": _throttling(cpu, cpu.get("throttled_time", 0)),
        },
        "cpuset": {
            "cpus": _ids(files["cpuset"].text("cpuset.cpus")),
            "mems": _ids(files["cpuset"].text("cpuset.mems")),
            **{name: files["cpuset"].number(f"cpuset.{name}") for name in _V1_CPUSET},
        },
        "memory": {
            "cache": raw.get("cache", 0),
            "usage": _v1_memory(memory, "memory"),
            "swap": _v1_memory(memory, "memory.memsw"),
            "kernel": _v1_memory(memory, "memory.kmem"),
            "kernelTCP": _v1_memory(memory, "memory.kmem.tcp"),
            "raw": raw,
        },
        "pids": _pids(files["pids"]),
        "blkio": {key: _v1_io(files["blkio"], names) for key, names in _V1_IO.items()},
        "hugetlb": {
            size: {
                "usage": files["hugetlb"].number(f"{name}.usage_in_bytes"),
                "max": files["hugetlb"].number(f"{name}.max_usage_in_bytes"),
                "failcnt": files["hugetlb"].number(f"{name}.failcnt"),
            }
            for size, name in _hugepages(files["hugetlb"], ".usage_in_bytes")
        },
    }


def _v2(files: _Files) -> dict[str, Any]:
    cpu, raw = files.keyed("cpu.stat"), files.keyed("memory.stat")
    memory, swap = _v2_memory(files, "memory"), _v2_memory(files, "memory.swap")
    # The shape is that of version 1, which counts memory and swap together.
    both = _UNLIMITED if _UNLIMITED in (memory["limit"], swap["limit"]) else memory["limit"] + swap["limit"]
    return {
        "cpu": {
            "usage": {
                "total": cpu.get("usage_usec", 0) * 1000,
                "kernel": cpu.get("system_usec", 0) * 1000,
                "user": cpu.get("user_usec", 0) * 1000,
            },
            "throttling": _throttling(cpu, cpu.get("throttled_usec", 0) * 1000),
        },
        "cpuset": {
            "cpus": _ids(files.text("cpuset.cpus.effective")),
            "mems": _ids(files.text("cpuset.mems.effective")),
        },
        "memory": {
            "cache": raw.get("file", 0),
            "usage": memory,
            "swap": {"limit": both, "usage": memory["usage"] + swap["usage"], "max": 0, "failcnt": swap["failcnt"]},
            "raw": raw,
        },
        "pids": _pids(files),
        "blkio": _v2_io(files.text("io.stat")),
        "hugetlb": {
            size: {
                "usage": files.number(f"{name}.current"),
                "failcnt": files.keyed(f"{name}.events").get("max", 0),
            }
            for size, name in _hugepages(files, ".current")
        },
    }


def _throttling(cpu: Mapping[str, int], time_ns: int) -> dict[str, int]:
    return {
        "periods": cpu.get("nr_periods", 0),
        "throttledPeriods": cpu.get("nr_throttled", 0),
        "throttledTime": time_ns,
    }


def _v1_memory(files: _Files, prefix: str) -> dict[str, int]:
    limit = files.number(f"{prefix}.limit_in_bytes")
    return {
        # Version 1 shows "no limit" as the largest whole number of pages.
        "limit": _UNLIMITED if limit >= 2**63 - 2**16 else limit,
        "usage": files.number(f"{prefix}.usage_in_bytes"),
        "max": files.number(f"{prefix}.max_usage_in_bytes"),
        "failcnt": files.number(f"{prefix}.failcnt"),
    }


def _v2_memory(files: _Files, prefix: str) -> dict[str, int]:
    return {
        "limit": files.number(f"{prefix}.max"),
        "usage": files.number(f"{prefix}.current"),
        "max": files.number(f"{prefix}.peak"),
        "failcnt": files.keyed(f"{prefix}.events").get("max", 0),
    }


def _pids(files: _Files) -> dict[str, int]:
    limit = files.number("pids.max")
    return {"current": files.number("pids.current"), "limit": 0 if limit == _UNLIMITED else limit}


def _v1_io(files: _Files, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Parse lines such as "8:0 Read 4096" of the first file that has any."""
    for name in names:
        found = []
        for line in files.text(name).splitlines():
            device, *operation, value = line.split()
            major, colon, minor = device.partition(":")
            if colon:
                found.append({"major": int(major), "minor": int(minor), "op": "".join(operation), "value": int(value)})
        if found:
            return found
    return []


def _v2_io(text: str) -> dict[str, list[dict[str, Any]]]:
    """Parse lines such as "8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0"."""
    names = {"rbytes": ("ioServiceBytesRecursive", "Read"), "wbytes": ("ioServiceBytesRecursive", "Write")}
    names |= {"rios": ("ioServicedRecursive", "Read"), "wios": ("ioServicedRecursive", "Write")}
    found: dict[str, list[dict[str, Any]]] = {"ioServiceBytesRecursive": [], "ioServicedRecursive": []}
    for line in text.splitlines():
        device, *pairs = line.split()
        major, _, minor = device.partition(":")
        for key, _, value in (pair.partition("=") for pair in pairs):
            if key in names:
                place, operation = names[key]
                entry = {"major": int(major), "minor": int(minor), "op": operation, "value": int(value)}
                found[place].append(entry)
    return found


def _hugepages(files: _Files, suffix: str) -> Iterator[tuple[str, str]]:
    """Yield each page size and the prefix of its files: those of reservations if the kernel has them."""
    try:
        names = sorted(os.listdir(files.directory)) if files.directory is not None else []
    except FileNotFoundError:
        names = []  # the container has been deleted
    for name in names:
        if name.startswith("hugetlb.") and name.endswith(suffix) and not name.endswith(f".rsvd{suffix}"):
            plain = name.removesuffix(suffix)
            reserved = os.path.exists(f"{files.directory}/{plain}.rsvd{suffix}")
            yield plain.removeprefix("hugetlb."), f"{plain}.rsvd" if reserved else plain


def _ids(text: str) -> list[int]:
    """Return the numbers in a list such as "0-2,7"."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def oom_events(cgroup: Cgroup, interval: float | None) -> Iterator[bool]:
    """See Cgroup.oom_events. Raises ContainerError where there is no memory cgroup."""
    if "memory" in cgroup.paths:
        return _v1_oom(cgroup, cgroup.paths["memory"], interval)
    if cgroup.unified_only:
        return _v2_oom(cgroup.paths[""], interval)
    raise ContainerError("this host does not have a memory cgroup")


def _v1_oom(cgroup: Cgroup, directory: str, interval: float | None) -> Iterator[bool]:
    """Watch an eventfd that the kernel signals (cgroup-v1/memory.rst, "OOM Control"), also at the cgroup's removal."""
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        try:
            control = os.open(f"{directory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            try:
                target = os.open(f"{directory}/cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(target, f"{event} {control}".encode())
                finally:
                    os.close(target)
            finally:
                os.close(control)
        except OSError as error:
            if error.errno in _GONE:
                return
            raise ContainerError(f"{directory}: cannot be watched: {error.strerror}") from None
        poll = select.poll()
        poll.register(event, select.POLLIN)
        due = _Due(interval)
        while True:
            alive = bool(cgroup.pids())  # no notification comes when the last process exits
            if poll.poll(due.wait(_ALIVE_INTERVAL) * 1000 if alive else 0):
                os.eventfd_read(event)
                if os.path.exists(directory):
                    yield True
            elif not alive:
                return
            elif due.reached():
                yield False
    finally:
        os.close(event)


def _v2_oom(directory: str, interval: float | None) -> Iterator[bool]:
    """Poll memory.events for oom_kill and cgroup.events for "populated": the kernel wakes pollers of both."""
    fds: list[int] = []
    try:
        try:
            fds += [
                os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC)
                for name in ("memory.events", "cgroup.events")
            ]
            seen = flat_keyed(read_again(fds[0])).get("oom_kill", 0)
        except OSError as error:
            if error.errno in _GONE:
                return
            raise ContainerError(f"{directory}: cannot be watched: {error.strerror}") from None
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLPRI)
        due = _Due(interval)
        while True:
            try:
                # In this order, because memory.events then has what killed the last process.
                populated, now = (flat_keyed(read_again(fd)) for fd in reversed(fds))
            except OSError:  # the cgroup has been removed
                return
            if now.get("oom_kill", 0) > seen:
                seen = now["oom_kill"]
                yield True
            if not populated.get("populated"):
                return
            if due.reached():
                yield False
            poll.poll(None if interval is None else due.wait(interval) * 1000)
    finally:
        for fd in fds:
            os.close(fd)


class _Due:
    """A moment that recurs every `interval` seconds, or never."""

    def __init__(self, interval: float | None) -> None:
        self._interval = interval
        self._next = float("inf") if interval is None else time.monotonic() + interval

    def wait(self, longest: float) -> float:
        """Return the seconds until then, at most `longest`."""
        return max(0.0, min(longest, self._next - time.monotonic()))

    def reached(self) -> bool:
        """Whether the moment has come; if so, the next one is an interval later."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + (self._interval or 0)
        return True
