"""Parse the `process` object of a config.json, or of the file for `exec --process` (runtime-spec, config.md)."""

from __future__ import annotations

from runtime.light.records import Record
from runtime.linux import capabilities

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.spec.fields import Fields

LIMIT_MAX = 2**64 - 1
ID_MAX = 2**32 - 2
_CPUS = 8192  # the largest CONFIG_NR_CPUS
# Names and numbers: linux/resource.h, linux/sched.h, linux/ioprio.h.
_RLIMITS = "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME"
RLIMITS = {f"RLIMIT_{name}": number for number, name in enumerate(_RLIMITS.split())}
SCHED_POLICIES = {
    "SCHED_OTHER": 0, "SCHED_FIFO": 1, "SCHED_RR": 2, "SCHED_BATCH": 3, "SCHED_ISO": 4, "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}  # fmt: skip
SCHED_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 1, "SCHED_FLAG_RECLAIM": 2, "SCHED_FLAG_DL_OVERRUN": 4, "SCHED_FLAG_KEEP_POLICY": 8,
    "SCHED_FLAG_KEEP_PARAMS": 16, "SCHED_FLAG_UTIL_CLAMP_MIN": 32, "SCHED_FLAG_UTIL_CLAMP_MAX": 64,
}  # fmt: skip
IOPRIO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}


class Rlimit(Record):
    """One resource limit; `type` as in config.json, such as "RLIMIT_NOFILE"."""

    type: str
    soft: int
    hard: int


class Scheduler(Record):
    """The arguments of sched_setattr(2); times in nanoseconds."""

    policy: int
    nice: int
    priority: int
    flags: int
    runtime: int
    deadline: int
    period: int


class Process(Record):
    """The program to run in the container, and its attributes.

    `capabilities` maps each of the five sets to names, including unknown ones (capabilities.warn). None: a container
    has none, and a process of `exec` has the container's. `console_size` is rows and columns; `io_priority` class and
    level; `initial_cpus` and `final_cpus` are those of execCPUAffinity, which a container's init ignores.
    """

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    umask: int | None = None
    terminal: bool = False
    console_size: tuple[int, int] | None = None
    capabilities: dict[str, frozenset[str]] | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    oom_score_adj: int | None = None
    apparmor_profile: str | None = None
    selinux_label: str | None = None
    scheduler: Scheduler | None = None
    io_priority: tuple[int, int] | None = None
    initial_cpus: tuple[int, ...] = ()
    final_cpus: tuple[int, ...] = ()


def parse_process(process: Fields) -> Process:
    """Validate a `process` object. Raises SpecError."""
    process.unsupported("commandLine")
    args = process.strings("args")
    if not args or not args[0]:
        process.refuse("args", "must be a non-empty array of strings")
    cwd = process.need("cwd", str)
    if not cwd.startswith("/"):
        process.refuse("cwd", "must be an absolute path")
    user = process.object("user")
    user.unsupported("username")
    gids: list[Any] = user.take("additionalGids", list, [])
    for index, gid in enumerate(gids):
        if not isinstance(gid, int) or isinstance(gid, bool) or not 0 <= gid <= ID_MAX:
            user.refuse(f"additionalGids[{index}]", "must be a group id")
    if len(gids) > 65536:  # NGROUPS_MAX, linux/limits.h
        user.refuse("additionalGids", "must hold at most 65536 groups")
    return Process(
        args=args,
        env=process.strings("env"),
        cwd=cwd,
        uid=user.natural("uid", 0, largest=ID_MAX) or 0,
        gid=user.natural("gid", 0, largest=ID_MAX) or 0,
        additional_gids=tuple(gids),
        umask=user.natural("umask", largest=0o777),
        terminal=process.take("terminal", bool, False),
        console_size=_console_size(process),
        capabilities=_capabilities(process),
        rlimits=_rlimits(process),
        no_new_privileges=process.take("noNewPrivileges", bool, False),
        oom_score_adj=process.number("oomScoreAdj", smallest=-1000, largest=1000),
        apparmor_profile=process.take("apparmorProfile", str, "") or None,
        selinux_label=process.take("selinuxLabel", str, "") or None,
        scheduler=_scheduler(process),
        io_priority=_io_priority(process),
        initial_cpus=_cpus(process.object("execCPUAffinity"), "initial"),
        final_cpus=_cpus(process.object("execCPUAffinity"), "final"),
    )


def _console_size(process: Fields) -> tuple[int, int] | None:
    if not process.has("consoleSize"):
        return None
    size = process.object("consoleSize")
    height, width = (size.natural(name, 0, largest=2**16 - 1) or 0 for name in ("height", "width"))
    return height, width


def _capabilities(process: Fields) -> dict[str, frozenset[str]] | None:
    if not process.has("capabilities"):
        return None
    sets = process.object("capabilities")
    found = {}
    for name in capabilities.SETS:
        found[name] = frozenset(sets.strings(name))
    return found


def _rlimits(process: Fields) -> tuple[Rlimit, ...]:
    found: dict[str, Rlimit] = {}
    for entry in process.objects("rlimits"):
        kind = entry.need("type", str)
        if kind not in RLIMITS:
            entry.refuse("type", f"unknown limit {kind!r}")
        if kind in found:
            entry.refuse("type", f"{kind} is given twice")
        soft = entry.natural("soft", 0, largest=LIMIT_MAX) or 0
        hard = entry.natural("hard", 0, largest=LIMIT_MAX) or 0
        if soft > hard:
            entry.refuse("soft", f"is {soft}, above the hard limit of {hard}")
        found[kind] = Rlimit(kind, soft, hard)
    return tuple(found.values())


def _scheduler(process: Fields) -> Scheduler | None:
    if not process.has("scheduler"):
        return None
    value = process.object("scheduler")
    policy = value.choice("policy", SCHED_POLICIES)
    if not policy:
        value.refuse("policy", "is missing")
    flags = 0
    for index, name in enumerate(value.strings("flags")):
        if name not in SCHED_FLAGS:
            value.refuse(f"flags[{index}]", f"unknown flag {name!r}")
        flags |= SCHED_FLAGS[name]
    priority = value.number("priority", 0, smallest=0, largest=99) or 0
    if bool(priority) != (policy in ("SCHED_FIFO", "SCHED_RR")):
        value.refuse("priority", "must be 1 to 99 for SCHED_FIFO and SCHED_RR, and 0 for other policies")
    times = [value.natural(name, 0) or 0 for name in ("runtime", "deadline", "period")]
    if any(times) and policy != "SCHED_DEADLINE":
        value.refuse("runtime", "runtime, deadline and period belong to SCHED_DEADLINE")
    nice = value.number("nice", 0, smallest=-20, largest=19) or 0
    return Scheduler(SCHED_POLICIES[policy], nice, priority, flags, *times)


def _cpus(affinity: Fields, name: str) -> tuple[int, ...]:
    """Parse a list of processors such as "0-3,7" into numbers."""
    found: set[int] = set()
    text = affinity.take(name, str, "").replace(" ", "")
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        ends = [first, last if dash else first]
        if not all(end.isdecimal() and len(end) < 5 for end in ends) or not int(ends[0]) <= int(ends[1]) < _CPUS:
            affinity.refuse(name, f"{part!r} is not a processor or a range such as 0-3")
        found.update(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(found))


def _io_priority(process: Fields) -> tuple[int, int] | None:
    if not process.has("ioPriority"):
        return None
    value = process.object("ioPriority")
    name = value.choice("class", IOPRIO_CLASSES)
    if not name:
        value.refuse("class", "is missing")
    return IOPRIO_CLASSES[name], value.number("priority", 0, smallest=0, largest=7) or 0
