"""pymigrate events ID: print events (out of memory) and resource use of a container, one JSON object per line."""

from __future__ import annotations

from migrate.cli.flags import Flag, Syntax

TYPE_CHECKING = False
if TYPE_CHECKING:
    from migrate.cli.flags import Values
    from runtime.cgroups.cgroup import Cgroup

SYNTAX = Syntax(
    "Print out-of-memory events as they happen, and resource use at an interval, until the container exits.",
    (
        Flag("interval", "time between two reports, such as 500ms, 5s, 1m30s", "str", default="5s", metavar="TIME"),
        Flag("stats", "print one report and exit"),
    ),
    ("id",),
)
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(text: str) -> float:
    """Return the seconds of a time as Go writes it, or of a plain number. Raises UsageError."""
    import re

    from migrate.errors import UsageError

    text += "s" if text.isdecimal() else ""
    parts = re.findall(r"([0-9]+\.?[0-9]*|\.[0-9]+)([a-zµ]*)", text)
    known = "".join(map("".join, parts)) == text and all(unit in _UNITS for _, unit in parts)
    value = sum(float(number) * _UNITS[unit] for number, unit in parts) if known else 0.0
    if not 0 < value < 1e9:
        raise UsageError(f"--interval {text}: must be a time such as 500ms, 5s or 1m")
    return value


def run(args: Values) -> int:
    from runtime.cgroups.cgroup import Cgroup
    from runtime.state.store import Store

    interval = _seconds(args.interval)
    state = Store(args.root).load(args.id)
    state.status.require(args.id, "show events of")
    cgroup = Cgroup.of(state)
    if args.stats:
        _print_stats(args.id, cgroup)
        return 0
    for happened in cgroup.oom_events(interval):
        if happened:
            _print({"type": "oom", "id": args.id})
        else:
            _print_stats(args.id, cgroup)
    return 0


def _print_stats(container_id: str, cgroup: Cgroup) -> None:
    _print({"type": "stats", "id": container_id, "data": cgroup.stats()})


def _print(event: dict[str, object]) -> None:
    from runtime.light import json as light_json

    print(light_json.dumps(event), flush=True)
