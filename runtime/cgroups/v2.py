"""Limits as version 2 files (kernel: Documentation/admin-guide/cgroup-v2.rst).

Device rules need a BPF program on version 2; what a container can reach is limited to the nodes in its /dev and by
the lack of CAP_MKNOD, so rules that only deny are accepted and others are the runtime's next step.
"""

from collections.abc import Iterator

from runtime.spec import Resources

Write = tuple[str, str, str, str]  # field of config.json, controller, file, value


def cpu_weight(shares: int) -> int:
    """Version 1 shares (2 to 262144, 1024 is normal) as a weight (1 to 10000, 100 is normal), as runc converts them."""
    return 1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142


def writes(resources: Resources) -> Iterator[Write]:
    """What to write where."""
    memory, swap = resources.memory_limit, resources.memory_swap
    values: list[tuple[str, str, str | None]] = [
        ("memory.limit", "memory.max", _limit(memory)),
        ("memory.swap", "memory.swap.max", _limit(swap if swap in (None, -1) else (swap or 0) - (memory or 0))),
        ("memory.reservation", "memory.low", _limit(resources.memory_reservation)),
        ("cpu.shares", "cpu.weight", str(cpu_weight(resources.cpu_shares)) if resources.cpu_shares else None),
        ("cpu.quota", "cpu.max", _bandwidth(resources)),
        ("cpu.cpus", "cpuset.cpus", resources.cpus),
        ("cpu.mems", "cpuset.mems", resources.mems),
        ("pids.limit", "pids.max", _limit(resources.pids_limit or None)),
    ]
    for field, file, value in values:
        if value is not None:
            yield field, "", file, value
    for key, value in resources.unified.items():
        yield f"unified.{key}", "", key, value


def _limit(value: int | None) -> str | None:
    if value is None:
        return None
    return "max" if value < 0 else str(value)


def _bandwidth(resources: Resources) -> str | None:
    if not resources.cpu_quota and not resources.cpu_period:
        return None
    quota = resources.cpu_quota or -1
    return f"{'max' if quota < 0 else quota} {resources.cpu_period or 100000}"
