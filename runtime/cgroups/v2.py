"""Translate limits to version 2 files (kernel: Documentation/admin-guide/cgroup-v2.rst), except device rules."""

from __future__ import annotations

import os

from runtime.errors import ContainerError, NotSupported
from runtime.linux.files import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from runtime.cgroups.v1 import Write
    from runtime.spec.resources import Resources


def cpu_weight(shares: int) -> int:
    """Convert version 1 shares (2 to 262144, normally 1024) to a weight (1 to 10000, normally 100).

    The curve goes through these three pairs. crun has it since 1.23, runc since 1.4.
    """
    import math

    if shares <= 2 or shares >= 262144:
        return 1 if shares <= 2 else 10000
    log = math.log2(shares)
    return math.ceil(10 ** ((log * log + 125 * log) / 612 - 7 / 34))


def io_weight(weight: int) -> int:
    """Convert a weight of blkio (10 to 1000) to one of io.weight (1 to 10000), linearly as runc does."""
    return 1 + (max(weight, 10) - 10) * 9999 // 990


def swap_limit(resources: Resources, memory_max: str = "max") -> str | None:
    """Return memory.swap.max, which counts only swap; config.json's number counts memory and swap together.

    `memory_max` is the limit in effect if the resources have none. Raises ContainerError.
    """
    memory, swap = resources.memory_limit, resources.memory_swap
    if swap is None:
        return "max" if memory == -1 else None
    if swap == -1:
        return "max"
    if memory is None and memory_max == "max":
        raise ContainerError(
            "linux.resources.memory.swap: is memory and swap together, and there is no limit of memory",
            remedy="set linux.resources.memory.limit too",
        )
    limit = int(memory_max) if memory is None else max(memory, 0)
    if swap < limit:
        raise ContainerError(f"linux.resources.memory.swap: is {swap}, below the memory limit of {limit}")
    return str(swap - limit)


def refuse_impossible(resources: Resources) -> None:
    """Raise NotSupported, naming the field, for a limit that only version 1 has."""
    for field, there in (
        ("memory.kernelTCP", resources.memory_kernel_tcp is not None),
        ("memory.swappiness", resources.memory_swappiness is not None),
        ("memory.disableOOMKiller", bool(resources.memory_oom_killer_off)),
        ("memory.useHierarchy", resources.memory_hierarchy is False),
        ("cpu.realtimeRuntime", resources.cpu_rt_runtime is not None),
        ("cpu.realtimePeriod", resources.cpu_rt_period is not None),
        ("blockIO.leafWeight", resources.io_leaf_weight is not None),
        ("network.classID", resources.net_class_id is not None),
        ("network.priorities", bool(resources.net_priorities)),
        *(
            (f"blockIO.weightDevice[{index}].leafWeight", device.leaf_weight is not None)
            for index, device in enumerate(resources.io_weight_devices)
        ),
    ):
        if there:
            raise NotSupported(f"linux.resources.{field}: is not to be had with cgroup version 2")


def writes(resources: Resources, directory: str) -> Iterator[Write]:
    """Return the writes, without device rules and `unified`. Raises ContainerError, NotSupported."""
    refuse_impossible(resources)
    _check_usage(resources, directory)
    values: list[tuple[str, str, str | int | None]] = [
        ("memory.swap", "memory.swap.max", _swap(resources, directory)),
        ("memory.limit", "memory.max", _limit(resources.memory_limit)),
        ("memory.reservation", "memory.low", _limit(resources.memory_reservation)),
        ("cpu.idle", "cpu.idle", resources.cpu_idle),
        ("cpu.quota", "cpu.max", _bandwidth(resources, directory)),
        ("cpu.burst", "cpu.max.burst", resources.cpu_burst),
        ("cpu.cpus", "cpuset.cpus", resources.cpus),
        ("cpu.mems", "cpuset.mems", resources.mems),
        ("pids.limit", "pids.max", _pids(resources.pids_limit)),
    ]
    if resources.cpu_shares is not None and not resources.cpu_idle:  # an idle group has its own weight
        values.append(("cpu.shares", "cpu.weight", cpu_weight(resources.cpu_shares)))
    for field, file, value in values:
        if value is not None:
            yield field, "", file, str(value)
    yield from _io(resources, directory)
    for index, (size, limit) in enumerate(resources.hugepage_limits):
        for file in (f"hugetlb.{size}.max", f"hugetlb.{size}.rsvd.max"):
            if ".rsvd" not in file or os.path.exists(f"{directory}/{file}"):
                yield f"hugepageLimits[{index}]", "", file, str(limit)
    for device, limits in resources.rdma.items():
        line = " ".join([device, *(f"{key}={limit}" for key, limit in limits.items())])
        yield f"rdma.{device}", "", "rdma.max", line


def _limit(value: int | None) -> str | None:
    if value is None:
        return None
    return "max" if value < 0 else str(value)


def _pids(limit: int | None) -> str | None:
    """Both 0 and -1 mean no limit."""
    return _limit(limit or -1) if limit is not None else None


def _read(directory: str, file: str) -> str | None:
    try:
        return read(f"{directory}/{file}")
    except FileNotFoundError:
        return None


def _check_usage(resources: Resources, directory: str) -> None:
    """Check memory.checkBeforeUpdate: the kernel would kill processes until they fit the new limit."""
    limit = resources.memory_limit or -1
    if resources.memory_check and limit > 0:
        used = int(_read(directory, "memory.current") or 0)
        if used > limit:
            raise ContainerError(f"linux.resources.memory.limit: is {limit}, and {used} bytes are in use")


def swap_to_write(resources: Resources, directory: str) -> str | None:
    """Return the value for memory.swap.max, whether the kernel has it or not. Raises ContainerError."""
    known = resources.memory_limit is not None or resources.memory_swap is None
    return swap_limit(resources, "max" if known else _read(directory, "memory.max") or "max")


def _swap(resources: Resources, directory: str) -> str | None:
    value = swap_to_write(resources, directory)
    if value in ("max", "0") and not os.path.exists(f"{directory}/memory.swap.max"):
        return None  # a kernel without swap uses none, and has no limit for it
    return value


def _bandwidth(resources: Resources, directory: str) -> str | None:
    """Return the value of cpu.max. A quota alone keeps the period, but a period alone does not keep the quota."""
    quota, period = resources.cpu_quota, resources.cpu_period
    if quota is None and period is None:
        return None
    text = (_read(directory, "cpu.max") or "max").split()[0] if quota is None else _limit(quota)
    return f"{text} {period}" if period else text


def _io(resources: Resources, directory: str) -> Iterator[Write]:
    bfq = os.path.exists(f"{directory}/io.bfq.weight")
    file = "io.bfq.weight" if bfq else "io.weight"
    if resources.io_weight is not None:
        yield "blockIO.weight", "", file, str(resources.io_weight if bfq else io_weight(resources.io_weight))
    for index, device in enumerate(resources.io_weight_devices):
        if device.weight is not None:
            weight = device.weight if bfq else io_weight(device.weight)
            field = f"blockIO.weightDevice[{index}].weight"
            yield field, "", file, f"{device.major}:{device.minor} {weight}"
    for throttle in resources.io_throttles:
        rate = throttle.rate or "max"
        yield throttle.field, "", "io.max", f"{throttle.major}:{throttle.minor} {throttle.kind}={rate}"
