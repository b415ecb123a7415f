"""Translate limits to version 1 files (kernel: Documentation/admin-guide/cgroup-v1)."""

from __future__ import annotations

import os

from runtime.errors import NotSupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from runtime.spec.resources import DeviceRule, Resources

    Write = tuple[str, str, str, str]  # field of linux.resources, controller, file, value

EVERYTHING = "a *:* rwm"
_THROTTLES = {
    "rbps": "blkio.throttle.read_bps_device",
    "wbps": "blkio.throttle.write_bps_device",
    "riops": "blkio.throttle.read_iops_device",
    "wiops": "blkio.throttle.write_iops_device",
}


def writes(resources: Resources, paths: Mapping[str, str]) -> Iterator[Write]:
    """Return the writes, without device rules and `unified`; `paths` are the directories by controller."""
    memory, swap = resources.memory_limit, resources.memory_swap
    if memory == -1 and swap is None and _exists(paths, "memory", "memory.memsw.limit_in_bytes"):
        swap = -1  # the limit of memory alone may not exceed that of both together
    hierarchy, killer_off = resources.memory_hierarchy, resources.memory_oom_killer_off
    plain: list[tuple[str, str, str, int | str | None]] = [
        ("memory.useHierarchy", "memory", "memory.use_hierarchy", None if hierarchy is None else int(hierarchy)),
        ("memory.limit", "memory", "memory.limit_in_bytes", memory),
        ("memory.swap", "memory", "memory.memsw.limit_in_bytes", swap),
        ("memory.reservation", "memory", "memory.soft_limit_in_bytes", resources.memory_reservation),
        ("memory.kernelTCP", "memory", "memory.kmem.tcp.limit_in_bytes", resources.memory_kernel_tcp),
        ("memory.swappiness", "memory", "memory.swappiness", resources.memory_swappiness),
        ("memory.disableOOMKiller", "memory", "memory.oom_control", None if killer_off is None else int(killer_off)),
        ("cpu.idle", "cpu", "cpu.idle", resources.cpu_idle),
        # The kernel gives an idle group its own weight and refuses any other.
        ("cpu.shares", "cpu", "cpu.shares", None if resources.cpu_idle else resources.cpu_shares),
        ("cpu.period", "cpu", "cpu.cfs_period_us", resources.cpu_period),
        ("cpu.quota", "cpu", "cpu.cfs_quota_us", resources.cpu_quota),
        ("cpu.burst", "cpu", "cpu.cfs_burst_us", resources.cpu_burst),
        ("cpu.realtimePeriod", "cpu", "cpu.rt_period_us", resources.cpu_rt_period),
        ("cpu.realtimeRuntime", "cpu", "cpu.rt_runtime_us", resources.cpu_rt_runtime),
        ("cpu.cpus", "cpuset", "cpuset.cpus", resources.cpus),
        ("cpu.mems", "cpuset", "cpuset.mems", resources.mems),
        ("pids.limit", "pids", "pids.max", _unlimited(resources.pids_limit)),
        ("network.classID", "net_cls", "net_cls.classid", resources.net_class_id),
    ]
    for field, controller, file, value in plain:
        if value is not None:
            yield field, controller, file, str(value)
    yield from _io(resources, paths)
    for index, (size, limit) in enumerate(resources.hugepage_limits):
        for kind in ("", ".rsvd"):
            file = f"hugetlb.{size}{kind}.limit_in_bytes"
            if not kind or _exists(paths, "hugetlb", file):  # reservations can be limited since Linux 5.7
                yield f"hugepageLimits[{index}]", "hugetlb", file, str(limit)
    for index, (name, priority) in enumerate(resources.net_priorities):
        yield f"network.priorities[{index}]", "net_prio", "net_prio.ifpriomap", f"{name} {priority}"
    for device, limits in resources.rdma.items():
        line = " ".join([device, *(f"{key}={limit}" for key, limit in limits.items())])
        yield f"rdma.{device}", "rdma", "rdma.max", line


def _io(resources: Resources, paths: Mapping[str, str]) -> Iterator[Write]:
    # The files of CFQ, which Linux 5.0 removed. BFQ has some of them under another name.
    bfq = "" if _exists(paths, "blkio", "blkio.weight") else "bfq."
    if resources.io_weight is not None:
        yield "blockIO.weight", "blkio", f"blkio.{bfq}weight", str(resources.io_weight)
    if resources.io_leaf_weight is not None:
        yield "blockIO.leafWeight", "blkio", "blkio.leaf_weight", str(resources.io_leaf_weight)
    for index, device in enumerate(resources.io_weight_devices):
        for name, file, weight in (
            ("weight", f"blkio.{bfq}weight_device", device.weight),
            ("leafWeight", "blkio.leaf_weight_device", device.leaf_weight),
        ):
            if weight is not None:
                field = f"blockIO.weightDevice[{index}].{name}"
                yield field, "blkio", file, f"{device.major}:{device.minor} {weight}"
    for throttle in resources.io_throttles:
        yield throttle.field, "blkio", _THROTTLES[throttle.kind], f"{throttle.major}:{throttle.minor} {throttle.rate}"


def _exists(paths: Mapping[str, str], controller: str, file: str) -> bool:
    return controller in paths and os.path.exists(f"{paths[controller]}/{file}")


def _unlimited(limit: int | None) -> str | None:
    """Both 0 and -1 mean no limit."""
    if limit is None:
        return None
    return str(limit) if limit > 0 else "max"


def device_writes(rules: Sequence[DeviceRule], current: str) -> Iterator[Write]:
    """Return lines for devices.allow and devices.deny; `current` is the content of devices.list.

    Where all devices are denied already, only what differs is written: a running container must not be without its
    devices for a moment, and the kernel refuses to deny everything to a cgroup that has children. Raises NotSupported
    for a device that is to be taken out of a range that is allowed, which version 1 cannot do.
    """
    allowed = allow_list(rules)
    if allowed is None:
        for index, rule in enumerate(rules):
            yield f"devices[{index}]", "devices", "devices.allow" if rule.allow else "devices.deny", _line(rule)
        return
    before: dict[str, str] = {}
    if current.strip() == EVERYTHING:
        yield "devices", "devices", "devices.deny", "a"
    else:
        before = {device: access for device, _, access in (line.rpartition(" ") for line in current.splitlines())}
    for device, access in allowed.items():
        more = "".join(sorted(set(access) - set(before.get(device, ""))))
        if more:
            yield "devices", "devices", "devices.allow", f"{device} {more}"
    for device, access in before.items():
        less = "".join(sorted(set(access) - set(allowed.get(device, ""))))
        if less:
            yield "devices", "devices", "devices.deny", f"{device} {less}"


def allow_list(rules: Sequence[DeviceRule]) -> dict[str, str] | None:
    """Return what is allowed if all else is denied, as "c 1:3" to "rwm"; None if the rules deny only some devices."""
    allowed: dict[str, str] | None = None
    for index, rule in enumerate(rules):
        device, _, access = _line(rule).rpartition(" ")
        if rule.type == "a":
            allowed = None if rule.allow else {}
        elif allowed is None:
            continue
        elif rule.allow:
            allowed[device] = "".join(sorted(set(allowed.get(device, "")) | set(access)))
        else:
            allowed[device] = "".join(sorted(set(allowed.get(device, "")) - set(access)))
            wider = [other for other, its in allowed.items() if set(its) & set(access) and _covers(other, device)]
            if wider:
                raise NotSupported(
                    f"linux.resources.devices[{index}]: version 1 cannot deny {device} while {wider[0]} is allowed"
                )
    return allowed


def _covers(wider: str, narrower: str) -> bool:
    """Whether two device names, as "c 1:*", can mean the same device."""
    (kind, _, numbers), (other_kind, _, other_numbers) = wider.partition(" "), narrower.partition(" ")
    pairs = zip(numbers.split(":"), other_numbers.split(":"), strict=True)
    return kind == other_kind and all("*" in (one, other) or one == other for one, other in pairs)


def _line(rule: DeviceRule) -> str:
    if rule.type == "a":
        return "a"
    numbers = ":".join("*" if number is None else str(number) for number in (rule.major, rule.minor))
    return f"{rule.type} {numbers} {rule.access}"
