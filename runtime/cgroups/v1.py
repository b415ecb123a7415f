"""Limits as version 1 files (kernel: Documentation/admin-guide/cgroup-v1)."""

from collections.abc import Iterator

from runtime.spec import DeviceRule, Resources

Write = tuple[str, str, str, str]  # field of config.json, controller, file, value


def device_line(rule: DeviceRule) -> str:
    """A line for devices.allow or devices.deny."""
    if rule.type == "a":
        return "a"
    numbers = ":".join("*" if number is None else str(number) for number in (rule.major, rule.minor))
    return f"{rule.type} {numbers} {rule.access}"


def writes(resources: Resources) -> Iterator[Write]:
    """What to write where, in an order the kernel accepts."""
    # Swap is memory plus swap here, and may never be below memory: memory goes first when both are set anew.
    plain: list[tuple[str, str, str, int | str | None]] = [
        ("memory.limit", "memory", "memory.limit_in_bytes", resources.memory_limit),
        ("memory.swap", "memory", "memory.memsw.limit_in_bytes", resources.memory_swap),
        ("memory.reservation", "memory", "memory.soft_limit_in_bytes", resources.memory_reservation),
        ("cpu.shares", "cpu", "cpu.shares", resources.cpu_shares or None),
        ("cpu.period", "cpu", "cpu.cfs_period_us", resources.cpu_period or None),
        ("cpu.quota", "cpu", "cpu.cfs_quota_us", resources.cpu_quota or None),
        ("cpu.cpus", "cpuset", "cpuset.cpus", resources.cpus),
        ("cpu.mems", "cpuset", "cpuset.mems", resources.mems),
        ("pids.limit", "pids", "pids.max", _unlimited(resources.pids_limit)),
    ]
    for field, controller, file, value in plain:
        if value is not None:
            yield field, controller, file, str(value)
    for index, rule in enumerate(resources.devices):
        yield f"devices[{index}]", "devices", "devices.allow" if rule.allow else "devices.deny", device_line(rule)
    for key, value in resources.unified.items():
        yield f"unified.{key}", "", key, value


def _unlimited(limit: int | None) -> str | None:
    """Both 0 and -1 mean no limit for runc."""
    if limit is None:
        return None
    return str(limit) if limit > 0 else "max"
