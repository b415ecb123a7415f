"""Parse `linux.resources` (runtime-spec 1.2, config-linux.md), from a bundle's config.json or given to `update`."""

from __future__ import annotations

from runtime.light.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.spec.fields import Fields

_UINT16, _UINT32, _UINT64 = 2**16 - 1, 2**32 - 1, 2**64 - 1
# Field of blockIO -> its name in version 2's io.max.
_THROTTLES = {
    "throttleReadBpsDevice": "rbps",
    "throttleWriteBpsDevice": "wbps",
    "throttleReadIOPSDevice": "riops",
    "throttleWriteIOPSDevice": "wiops",
}


class DeviceRule(Record):
    """One device rule: `type` is a, b or c; a `major` or `minor` of None means all; `access` consists of r, w and m."""

    allow: bool
    type: str
    major: int | None
    minor: int | None
    access: str


class WeightDevice(Record):
    """The weights of one block device; None means the cgroup's own."""

    major: int
    minor: int
    weight: int | None
    leaf_weight: int | None


class Throttle(Record):
    """A limit of one block device, in bytes or operations a second, 0 for none. `kind`: rbps, wbps, riops, wiops."""

    field: str
    kind: str
    major: int
    minor: int
    rate: int


class Resources(Record):
    """Limits; None means not given. Memory in bytes, -1 for unlimited; processor times in microseconds."""

    memory_limit: int | None = None
    memory_reservation: int | None = None
    memory_swap: int | None = None
    memory_kernel_tcp: int | None = None
    memory_swappiness: int | None = None
    memory_oom_killer_off: bool | None = None
    memory_hierarchy: bool | None = None
    memory_check: bool = False
    cpu_shares: int | None = None
    cpu_quota: int | None = None
    cpu_burst: int | None = None
    cpu_period: int | None = None
    cpu_rt_runtime: int | None = None
    cpu_rt_period: int | None = None
    cpu_idle: int | None = None
    cpus: str | None = None
    mems: str | None = None
    pids_limit: int | None = None
    io_weight: int | None = None
    io_leaf_weight: int | None = None
    io_weight_devices: tuple[WeightDevice, ...] = ()
    io_throttles: tuple[Throttle, ...] = ()
    hugepage_limits: tuple[tuple[str, int], ...] = ()
    net_class_id: int | None = None
    net_priorities: tuple[tuple[str, int], ...] = ()
    rdma: dict[str, dict[str, int]] = {}
    devices: tuple[DeviceRule, ...] = ()
    unified: dict[str, str] = {}


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the resources object equal to applying `old`, then `new`; fields missing in `new` stay."""
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        both = isinstance(before, dict) and isinstance(value, dict)
        merged[name] = merge(before or {}, value) if both else value
    return merged


def parse_resources(resources: Fields) -> Resources:
    """Validate the `linux.resources` of a config.json, or of `update`. Raises SpecError.

    A 0 that would be useless as a limit counts as absent, as engines mean it.
    """
    memory, cpu, io = resources.object("memory"), resources.object("cpu"), resources.object("blockIO")
    network = resources.object("network")
    # memory.kernel is accepted and ignored: kernels since 5.16 lack this limit, and engines still send it.
    _limit(memory, "kernel")
    quota, burst = _limit(cpu, "quota") or None, cpu.natural("burst")
    if burst and quota and 0 < quota < burst:
        cpu.refuse("burst", f"is {burst}, above the quota of {quota}")
    return Resources(
        memory_limit=_limit(memory, "limit") or None,
        memory_reservation=_limit(memory, "reservation") or None,
        memory_swap=_swap(memory),
        memory_kernel_tcp=_limit(memory, "kernelTCP") or None,
        memory_swappiness=memory.natural("swappiness", largest=100),
        memory_oom_killer_off=_flag(memory, "disableOOMKiller"),
        memory_hierarchy=_flag(memory, "useHierarchy"),
        memory_check=memory.take("checkBeforeUpdate", bool, False),
        cpu_shares=cpu.natural("shares") or None,
        cpu_quota=quota,
        cpu_burst=burst,
        cpu_period=cpu.natural("period") or None,
        cpu_rt_runtime=_limit(cpu, "realtimeRuntime") or None,
        cpu_rt_period=cpu.natural("realtimePeriod") or None,
        cpu_idle=cpu.natural("idle", largest=1),
        cpus=cpu.take("cpus", str, "") or None,
        mems=cpu.take("mems", str, "") or None,
        pids_limit=_limit(resources.object("pids"), "limit"),
        io_weight=io.natural("weight", largest=_UINT16) or None,
        io_leaf_weight=io.natural("leafWeight", largest=_UINT16) or None,
        io_weight_devices=tuple(_weight_device(entry) for entry in io.objects("weightDevice")),
        io_throttles=tuple(
            _throttle(entry, f"blockIO.{name}[{index}]", kind)
            for name, kind in _THROTTLES.items()
            for index, entry in enumerate(io.objects(name))
        ),
        hugepage_limits=tuple(_hugepage_limit(entry) for entry in resources.objects("hugepageLimits")),
        net_class_id=network.natural("classID", largest=_UINT32) or None,
        net_priorities=tuple(_priority(entry) for entry in network.objects("priorities")),
        rdma=_rdma(resources),
        devices=tuple(_device_rule(entry) for entry in resources.objects("devices")),
        unified=_unified(resources),
    )


def _limit(parent: Fields, name: str) -> int | None:
    """Return a number, -1 for unlimited."""
    return -1 if parent.value.get(name) == -1 else parent.natural(name)


def _flag(parent: Fields, name: str) -> bool | None:
    return None if parent.value.get(name) is None else parent.need(name, bool)


def _number(parent: Fields, name: str, largest: int = 2**63 - 1) -> int:
    """Return a required number."""
    parent.need(name, int)
    return parent.natural(name, largest=largest) or 0


def _swap(memory: Fields) -> int | None:
    """Return the limit of memory plus swap, which must not be below that of memory alone."""
    limit, swap = _limit(memory, "limit") or 0, _limit(memory, "swap") or None
    if swap is not None and 0 < swap < limit:
        memory.refuse("swap", f"is {swap}, below the limit of {limit}: it is memory and swap together")
    return swap


def _weight_device(entry: Fields) -> WeightDevice:
    weights = [entry.natural(name, largest=_UINT16) for name in ("weight", "leafWeight")]
    if weights == [None, None]:
        entry.refuse("weight", "is missing: must be a number")
    return WeightDevice(_number(entry, "major"), _number(entry, "minor"), *weights)


def _throttle(entry: Fields, place: str, kind: str) -> Throttle:
    rate = _number(entry, "rate", _UINT64)
    return Throttle(place, kind, _number(entry, "major"), _number(entry, "minor"), rate)


def _hugepage_limit(entry: Fields) -> tuple[str, int]:
    size = entry.need("pageSize", str)
    if not (size[:-2].isdecimal() and size.isascii() and size[-2:] in ("KB", "MB", "GB")):  # it is part of a file name
        entry.refuse("pageSize", f"must be a size such as 2MB, not {size!r}")
    return size, _number(entry, "limit", _UINT64)


def _priority(entry: Fields) -> tuple[str, int]:
    name = entry.need("name", str)
    if not name or name != "".join(name.split()):
        entry.refuse("name", f"{name!r} is not the name of a network interface")
    return name, _number(entry, "priority", _UINT32)


def _rdma(resources: Fields) -> dict[str, dict[str, int]]:
    """Return the limits of each device, under their names in rdma.max."""
    found: dict[str, dict[str, int]] = {}
    devices = resources.object("rdma")
    for name in devices.value:
        if not name or name != "".join(name.split()):
            devices.refuse(name, "is not the name of an RDMA device")
        entry = devices.object(name)
        numbers = {"hca_handle": entry.natural("hcaHandles", largest=_UINT32)}
        numbers["hca_object"] = entry.natural("hcaObjects", largest=_UINT32)
        found[name] = {key: number for key, number in numbers.items() if number is not None}
        if not found[name]:
            entry.refuse("hcaHandles", "is missing: must be a number")
    return found


def _device_rule(entry: Fields) -> DeviceRule:
    kind, access = entry.take("type", str, "a") or "a", entry.take("access", str, "rwm") or "rwm"
    if kind not in ("a", "c", "b"):
        entry.refuse("type", "must be a, b or c")
    if not set(access) <= set("rwm"):
        entry.refuse("access", "must be made of r, w and m")
    major, minor = (
        None if entry.value.get(name) in (None, -1) else entry.natural(name, largest=_UINT32)
        for name in ("major", "minor")
    )
    return DeviceRule(entry.take("allow", bool, False), kind, major, minor, access)


def _unified(resources: Fields) -> dict[str, str]:
    """Return the files of a version 2 cgroup, with the text to write to each."""
    files = resources.string_map("unified")
    for name in files:
        controller, dot, rest = name.partition(".")
        plain = name.replace(".", "").replace("_", "")
        if not (controller and dot and rest and plain.isascii() and plain.isalnum()):
            resources.refuse(f"unified.{name}", "is not the name of a cgroup file")
        # cgroup.procs would move the host's processes in, which would be killed with the container.
        if controller == "cgroup" and not rest.startswith("max."):
            resources.refuse(f"unified.{name}", "is not a limit")
    return files
