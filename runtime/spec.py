"""config.json of an OCI bundle (runtime-spec 1.2) as frozen dataclasses.

What this version does not do is refused with the field's path, never ignored in silence. Two things are read here
and refused only when a container is created, because `validate` speaks about them: `process.terminal` and
`linux.seccomp`.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime import capabilities
from runtime.errors import SpecError
from runtime.fields import Fields

NAMESPACES = ("pid", "network", "mount", "ipc", "uts", "cgroup")
PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable")
HOOK_POINTS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
LIMIT_MAX = 2**64 - 1


@dataclass(frozen=True)
class Rlimit:
    """`type` as in config.json, "RLIMIT_NOFILE"."""

    type: str
    soft: int
    hard: int


@dataclass(frozen=True)
class Process:
    """What runs in the container. `capabilities` maps each of the five sets to names; None leaves them alone."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    uid: int = 0
    gid: int = 0
    additional_gids: tuple[int, ...] = ()
    umask: int | None = None
    terminal: bool = False
    capabilities: dict[str, frozenset[str]] | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    oom_score_adj: int | None = None


@dataclass(frozen=True)
class Mount:
    destination: str
    type: str
    source: str
    options: tuple[str, ...] = ()

    @property
    def is_bind(self) -> bool:
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options


@dataclass(frozen=True)
class Device:
    """A device node to make: `type` is c, b or p."""

    path: str
    type: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int


@dataclass(frozen=True)
class DeviceRule:
    allow: bool
    type: str
    major: int | None
    minor: int | None
    access: str


@dataclass(frozen=True)
class Resources:
    """Limits; None means none. Memory in bytes, -1 for unlimited; cpu quota and period in microseconds."""

    memory_limit: int | None = None
    memory_reservation: int | None = None
    memory_swap: int | None = None
    cpu_shares: int | None = None
    cpu_quota: int | None = None
    cpu_period: int | None = None
    cpus: str | None = None
    mems: str | None = None
    pids_limit: int | None = None
    devices: tuple[DeviceRule, ...] = ()
    unified: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hook:
    """`timeout` in seconds."""

    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout: float | None


@dataclass(frozen=True)
class Spec:
    """One config.json. `namespaces` maps a type to the path to join, or None for a new one."""

    oci_version: str
    process: Process
    root: Path
    readonly: bool
    hostname: str | None
    domainname: str | None
    mounts: tuple[Mount, ...]
    namespaces: dict[str, str | None]
    hooks: dict[str, tuple[Hook, ...]]
    annotations: dict[str, str]
    masked_paths: tuple[str, ...]
    readonly_paths: tuple[str, ...]
    cgroups_path: str | None
    resources: Resources
    devices: tuple[Device, ...]
    sysctl: dict[str, str]
    rootfs_propagation: str | None
    seccomp: bool


def load(bundle: Path) -> Spec:
    """Read and check `bundle`/config.json. Raises SpecError naming file and field."""
    path = bundle / "config.json"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SpecError(
            f"{path}: no such file or directory", remedy="is this the bundle? `pymigrate spec` writes a config.json"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path}: is not JSON: {error}") from None
    return parse(value, bundle)


def parse(value: Any, bundle: Path) -> Spec:
    """Check the value of a config.json that belongs to `bundle`. Raises SpecError."""
    top = Fields(value, "config.json")
    version = top.need("ociVersion", str)
    if not re.match(r"1\.\d+\.\d+", version):
        top.refuse("ociVersion", f"must be 1.x.y, not {version!r}")
    root, linux = top.object("root"), top.object("linux")
    top.unsupported("vm", "windows", "solaris", "zos", "freebsd")
    linux.unsupported(
        "uidMappings", "gidMappings", "intelRdt", "mountLabel", "personality", "timeOffsets", "netDevices",
        "memoryPolicy",
    )  # fmt: skip
    top.need("process", dict)
    rootfs = root.need("path", str)
    if not rootfs:
        root.refuse("path", "must not be empty")
    propagation = linux.take("rootfsPropagation", str, "") or None
    if propagation is not None and propagation not in PROPAGATIONS:
        linux.refuse("rootfsPropagation", f"must be one of {', '.join(PROPAGATIONS)}")
    return Spec(
        oci_version=version,
        process=parse_process(top.object("process")),
        root=(bundle / rootfs).absolute(),
        readonly=root.take("readonly", bool, False),
        hostname=top.take("hostname", str, "") or None,
        domainname=top.take("domainname", str, "") or None,
        mounts=tuple(_mount(entry) for entry in top.objects("mounts")),
        namespaces=_namespaces(linux),
        hooks={point: tuple(map(_hook, top.object("hooks").objects(point))) for point in HOOK_POINTS},
        annotations=top.string_map("annotations"),
        masked_paths=_absolute(linux, "maskedPaths"),
        readonly_paths=_absolute(linux, "readonlyPaths"),
        cgroups_path=_cgroups_path(linux),
        resources=_resources(linux.object("resources")),
        devices=tuple(map(_device, linux.objects("devices"))),
        sysctl=linux.string_map("sysctl"),
        rootfs_propagation=propagation,
        seccomp=bool(linux.take("seccomp", dict, {})),
    )


def parse_process(process: Fields) -> Process:
    """Check a `process` object (of config.json, or a file given to `exec --process`). Raises SpecError."""
    process.unsupported("apparmorProfile", "selinuxLabel", "scheduler", "ioPriority", "execCPUAffinity", "commandLine")
    args = process.strings("args")
    if not args or not args[0]:
        process.refuse("args", "must be a non-empty array of strings")
    env = process.strings("env")
    for index, entry in enumerate(env):
        if "=" not in entry[1:]:
            process.refuse(f"env[{index}]", f"must be NAME=VALUE, not {entry!r}")
    cwd = process.need("cwd", str)
    if not cwd.startswith("/"):
        process.refuse("cwd", "must be an absolute path")
    user = process.object("user")
    gids: list[Any] = user.take("additionalGids", list, [])
    for index, gid in enumerate(gids):
        if not isinstance(gid, int) or isinstance(gid, bool) or not 0 <= gid < 2**32:
            user.refuse(f"additionalGids[{index}]", "must be a group id")
    score = process.take("oomScoreAdj", int, 0) if process.value.get("oomScoreAdj") is not None else None
    if score is not None and not -1000 <= score <= 1000:
        process.refuse("oomScoreAdj", "must be a number from -1000 to 1000")
    return Process(
        args=args,
        env=env,
        cwd=cwd,
        uid=user.natural("uid", 0, largest=2**32 - 2) or 0,
        gid=user.natural("gid", 0, largest=2**32 - 2) or 0,
        additional_gids=tuple(gids),
        umask=user.natural("umask", largest=0o777),
        terminal=process.take("terminal", bool, False),
        capabilities=_capabilities(process),
        rlimits=tuple(map(_rlimit, process.objects("rlimits"))),
        no_new_privileges=process.take("noNewPrivileges", bool, False),
        oom_score_adj=score,
    )


def _capabilities(process: Fields) -> dict[str, frozenset[str]] | None:
    if process.value.get("capabilities") is None:
        return None
    sets = process.object("capabilities")
    found = {}
    for name in capabilities.SETS:
        found[name] = frozenset(sets.strings(name))
        for index, capability in enumerate(sets.strings(name)):
            if capability not in capabilities.NUMBERS:
                sets.refuse(f"{name}[{index}]", f"unknown capability {capability!r}")
    return found


def _rlimit(entry: Fields) -> Rlimit:
    import resource

    kind = entry.need("type", str)
    if not re.fullmatch(r"RLIMIT_[A-Z]+", kind) or not hasattr(resource, kind):
        entry.refuse("type", f"unknown limit {kind!r}")
    soft = entry.natural("soft", 0, largest=LIMIT_MAX) or 0
    hard = entry.natural("hard", 0, largest=LIMIT_MAX) or 0
    if soft > hard:
        entry.refuse("soft", f"is {soft}, above the hard limit of {hard}")
    return Rlimit(kind, soft, hard)


def _mount(entry: Fields) -> Mount:
    destination = entry.need("destination", str)
    if not destination.startswith("/") or ".." in destination.split("/"):
        entry.refuse("destination", "must be an absolute path without ..")
    entry.unsupported("uidMappings", "gidMappings")
    options = entry.strings("options")
    for index, option in enumerate(options):
        if option in ("idmap", "ridmap", "tmpcopyup") or (option.startswith("r") and option[1:] in _RECURSIVE):
            entry.refuse(f"options[{index}]", f"{option} is not supported by this version")
    mount = Mount(destination, entry.take("type", str, ""), entry.take("source", str, ""), options)
    if mount.is_bind and not mount.source:
        entry.refuse("source", "is missing: a bind mount needs one")
    if not mount.type and not mount.is_bind:
        entry.refuse("type", "is missing")
    return mount


_FLAG_OPTIONS = "ro suid dev exec atime diratime relatime strictatime symfollow"
_RECURSIVE = frozenset(f"{prefix}{option}" for option in _FLAG_OPTIONS.split() for prefix in ("", "no")) | {"rw"}


def _namespaces(linux: Fields) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for entry in linux.objects("namespaces"):
        kind = entry.need("type", str)
        if kind not in NAMESPACES:
            entry.refuse("type", f"{kind!r} is not supported: must be one of {', '.join(NAMESPACES)}")
        if kind in found:
            entry.refuse("type", f"{kind!r} is there twice")
        path = entry.take("path", str, "") or None
        if path is not None and not path.startswith("/"):
            entry.refuse("path", "must be absolute")
        if path is not None and kind in ("mount", "pid", "cgroup"):
            entry.refuse("path", f"joining a {kind} namespace is not supported by this version")
        found[kind] = path
    for kind in ("pid", "mount"):
        if kind not in found:
            linux.refuse(
                "namespaces", f"must hold one of type {kind}: a container without cannot be kept apart or moved"
            )
    return found


def _hook(entry: Fields) -> Hook:
    path = entry.need("path", str)
    if not path.startswith("/"):
        entry.refuse("path", "must be absolute")
    timeout = entry.natural("timeout")
    if timeout == 0:
        entry.refuse("timeout", "must be greater than 0")
    return Hook(path, entry.strings("args") or (path,), entry.strings("env"), timeout)


def _absolute(parent: Fields, name: str) -> tuple[str, ...]:
    for index, path in enumerate(parent.strings(name)):
        if not path.startswith("/") or ".." in path.split("/"):
            parent.refuse(f"{name}[{index}]", "must be an absolute path without ..")
    return parent.strings(name)


def _cgroups_path(linux: Fields) -> str | None:
    path = linux.take("cgroupsPath", str, "") or None
    if path is not None and (".." in path.split("/") or ":" in path):
        linux.refuse("cgroupsPath", "must be a path without .. (systemd's slice:prefix:name is not supported yet)")
    return path


def _resources(resources: Fields) -> Resources:
    resources.unsupported("blockIO", "hugepageLimits", "network", "rdma")
    memory, cpu, pids = resources.object("memory"), resources.object("cpu"), resources.object("pids")
    memory.unsupported("kernel", "kernelTCP", "swappiness", "disableOOMKiller", "useHierarchy", "checkBeforeUpdate")
    cpu.unsupported("burst", "realtimeRuntime", "realtimePeriod", "idle")
    unified = resources.string_map("unified")
    for key in unified:
        if not re.fullmatch(r"[a-z]+(\.[a-z0-9_]+)+", key):
            resources.refuse(f"unified.{key}", "is no name of a cgroup file")
    return Resources(
        memory_limit=_limit(memory, "limit"),
        memory_reservation=_limit(memory, "reservation"),
        memory_swap=_limit(memory, "swap"),
        cpu_shares=cpu.natural("shares"),
        cpu_quota=_limit(cpu, "quota"),
        cpu_period=cpu.natural("period"),
        cpus=cpu.take("cpus", str, "") or None,
        mems=cpu.take("mems", str, "") or None,
        pids_limit=_limit(pids, "limit"),
        devices=tuple(map(_device_rule, resources.objects("devices"))),
        unified=unified,
    )


def _limit(parent: Fields, name: str) -> int | None:
    """A number, -1 for no limit."""
    return -1 if parent.value.get(name) == -1 else parent.natural(name)


def _device_rule(entry: Fields) -> DeviceRule:
    kind, access = entry.take("type", str, "a") or "a", entry.take("access", str, "rwm") or "rwm"
    if kind not in ("a", "c", "b"):
        entry.refuse("type", "must be a, b or c")
    if not set(access) <= set("rwm"):
        entry.refuse("access", "must be made of r, w and m")
    numbers = [None if entry.value.get(n) in (None, -1) else entry.natural(n) for n in ("major", "minor")]
    return DeviceRule(entry.take("allow", bool, False), kind, numbers[0], numbers[1], access)


def _device(entry: Fields) -> Device:
    path = entry.need("path", str)
    if not path.startswith("/") or ".." in path.split("/"):
        entry.refuse("path", "must be an absolute path without ..")
    kind = entry.need("type", str)
    if kind not in ("c", "b", "p", "u"):
        entry.refuse("type", "must be c, b, p or u")
    return Device(
        path=path,
        type="c" if kind == "u" else kind,
        major=entry.natural("major", 0) or 0,
        minor=entry.natural("minor", 0) or 0,
        mode=entry.natural("fileMode", 0o666, largest=0o7777) or 0,
        uid=entry.natural("uid", 0, largest=2**32 - 2) or 0,
        gid=entry.natural("gid", 0, largest=2**32 - 2) or 0,
    )
