"""pymigrate update ID: change the limits of a container."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from migrate.cli.flags import Values

# Flag -> group and field of a resources object, whether it is a size, help.
_LIMITS: dict[str, tuple[str, str, bool, str]] = {
    "blkio-weight": ("blockIO", "weight", False, "weight of block I/O, 10 to 1000"),
    "cpu-period": ("cpu", "period", False, "period of the CPU limit, in microseconds"),
    "cpu-quota": ("cpu", "quota", False, "CPU time per period, in microseconds; -1 for no limit"),
    "cpu-burst": ("cpu", "burst", False, "CPU time that can be saved up, in microseconds"),
    "cpu-share": ("cpu", "shares", False, "relative CPU weight; 1024 is normal"),
    "cpu-rt-period": ("cpu", "realtimePeriod", False, "period for real-time scheduling, in microseconds"),
    "cpu-rt-runtime": ("cpu", "realtimeRuntime", False, "real-time CPU time per period, in microseconds"),
    "cpu-idle": ("cpu", "idle", False, "1 to run only when nothing else does"),
    "memory": ("memory", "limit", True, "memory limit in bytes, or with a suffix k, m, g; -1 for no limit"),
    "memory-reservation": ("memory", "reservation", True, "soft memory limit"),
    "memory-swap": ("memory", "swap", True, "limit of memory and swap together"),
    "pids-limit": ("pids", "limit", False, "limit of processes and threads; -1 for no limit"),
}
_GONE = ("kernel-memory", "kernel-memory-tcp")
_RDT = ("l3-cache-schema", "mem-bw-schema")
_SETS = {"cpuset-cpus": "cpus", "cpuset-mems": "mems"}
SYNTAX = Syntax(
    "Change the limits of a container. Limits that are not named stay as they are.",
    (
        Flag(
            "resources",
            "a file with a resources object as in config.json; - for stdin",
            "str",
            short="r",
            metavar="FILE",
        ),
        *(Flag(name, text, "str", metavar="N") for name, (_, _, _, text) in _LIMITS.items()),
        Flag("cpuset-cpus", "CPUs, such as 0-2,7", "str", metavar="LIST"),
        Flag("cpuset-mems", "memory nodes, such as 0-2,7", "str", metavar="LIST"),
        *(
            Flag(name, "accepted for compatibility with runc and ignored: kernels have dropped it", "str", metavar="N")
            for name in _GONE
        ),
        *(Flag(name, "refused: linux.intelRdt is not supported", "str", metavar="SCHEMA") for name in _RDT),
    ),
    ("id",),
)


def run(args: Values) -> int:
    from runtime.lifecycle import control
    from runtime.state.store import Store

    value, name = _read(args.resources) if args.resources else (_from_flags(args), "update")
    control.update(Store(args.root), args.id, value, name)
    return 0


def _read(path: str) -> tuple[Any, str]:
    if path != "-":
        from runtime.spec.config import read_json

        return read_json(path, ""), path
    import sys

    from migrate.errors import UsageError
    from runtime.light import json as light_json

    try:
        return light_json.loads(sys.stdin.buffer.read()), "stdin"
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--resources -: stdin is not JSON: {error}") from None


def _from_flags(args: Values) -> dict[str, dict[str, Any]]:
    from migrate.errors import UsageError

    for flag in _RDT:
        if args.__dict__[flag.replace("-", "_")]:
            raise UsageError(f"--{flag}: linux.intelRdt is not supported")
    value: dict[str, dict[str, Any]] = {}
    for flag, (group, name, is_size, _) in _LIMITS.items():
        text = args.__dict__[flag.replace("-", "_")]
        if text is not None:
            value.setdefault(group, {})[name] = _number(flag, text, is_size=is_size)
    for flag, name in _SETS.items():
        if args.__dict__[flag.replace("-", "_")]:
            value.setdefault("cpu", {})[name] = args.__dict__[flag.replace("-", "_")]
    if not value and not any(args.__dict__[flag.replace("-", "_")] for flag in _GONE):
        raise UsageError("nothing to change", remedy="see `pymigrate update --help`")
    return value


def _number(flag: str, text: str, *, is_size: bool) -> int:
    """Return a number. A size can have a suffix (k, m, g, t: powers of 1024) and a fraction. Raises UsageError."""
    from migrate.errors import UsageError

    digits = text.lower().removesuffix("b").removesuffix("i") if is_size else text
    power = "kmgt".find(digits[-1:]) + 1 if is_size and digits[-1:] in tuple("kmgt") else 0
    try:
        return int(float(digits[:-1]) * (1 << 10 * power)) if power else int(digits)
    except (ValueError, OverflowError):
        raise UsageError(f"--{flag} {text}: must be a number") from None
