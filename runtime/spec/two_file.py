"""Read bundles in the two-file layout of the OCI specification 0.1 and 0.2 (2015) as a present config.json.

config.json held the fields that do not depend on the host, runtime.json those that do: namespaces, limits, devices,
hooks, the sources of mounts. Source: opencontainers/runtime-spec at v0.1.1 and v0.2.0 (config.md, config-linux.md,
runtime-config.md, runtime-config-linux.md and the Go types, whose zero values mean "not set"). Where those are silent,
the code does what runc of that time (0.0.5) did:

- one list of capabilities is the bounding, effective, permitted and inheritable set; without a list there are none;
- a read-only root makes sysfs read-only, uid mappings ask for a user namespace, `cwd` is / where it is missing;
- `type` of a device is a character or its number (a Go rune: 99 is c); each device may be used with `permissions`,
  beside those that every container may use; one without `path` is only a permission;
- seccomp without a default action, or one that allows and has no rules, means no filter.

What the layout cannot express has a fixed value: masked and read-only paths are the default ones (runc masked fewer,
and only below a read-only root), and there is a new cgroup namespace, because a cgroup mount showed the container its
own cgroup. `platform.arch` is not checked, because the kernel decides which binaries run (binfmt_misc).
"""

from __future__ import annotations

import os

from runtime.errors import NotSupported
from runtime.light import json as light_json
from runtime.spec.fields import Fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

HOOK_POINTS = ("prestart", "poststart", "poststop")
_SETS = ("bounding", "effective", "permitted", "inheritable")
_DEVICE_TYPES = ("c", "b", "u", "p")
_ID_MAX, _U64_MAX = 2**32 - 1, 2**64 - 1

# Numbers, in the order in which they are shown; 0 means "not set", except for swappiness.
MEMORY = ("limit", "reservation", "swap", "kernel", "kernelTCP")
CPU = ("shares", "quota", "period", "realtimeRuntime", "realtimePeriod")
CPU_LISTS = ("cpus", "mems")
_WEIGHTS = {"blkioWeight": "weight", "blkioLeafWeight": "leafWeight"}
_WEIGHT_DEVICES = {"blkioWeightDevice": "weightDevice"}
_THROTTLES = {
    "blkioThrottleReadBpsDevice": "throttleReadBpsDevice", "blkioThrottleWriteBpsDevice": "throttleWriteBpsDevice",
    "blkioThrottleReadIOPSDevice": "throttleReadIOPSDevice", "blkioThrottleWriteIOPSDevice": "throttleWriteIOPSDevice",
}  # fmt: skip
_THROTTLES_01 = {
    "blkioThrottleReadIopsDevice": "throttleReadIOPSDevice", "blkioThrottleWriteIopsDevice": "throttleWriteIOPSDevice",
}  # fmt: skip
BLOCK_IO = _WEIGHTS | _WEIGHT_DEVICES | _THROTTLES  # name in 0.2 -> name today


def is_two_file(bundle: str | Path) -> bool:
    """Return whether `bundle` has a runtime.json and a config.json of version 0.x; False if they cannot be read."""
    if not os.path.isfile(os.path.join(bundle, "runtime.json")):
        return False
    try:
        with open(os.path.join(bundle, "config.json"), "rb") as file:
            config = light_json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(config, dict) or "ociVersion" in config:
        return False
    version = config.get("version")
    return isinstance(version, str) and version.startswith("0.")


def merge(config: dict[str, Any], runtime: dict[str, Any]) -> dict[str, Any]:
    """Return the value of one config.json (1.2), made from the values of the two files.

    Types and names are checked here, so that an error names the right file. config.parse checks the meaning of values;
    `translate` maps its errors back to the two files. Raises SpecError.
    """
    top, host = Fields(config, "config.json"), Fields(runtime, "runtime.json")
    _known(top, "version", "platform", "process", "root", "hostname", "mounts", "linux")
    _known(host, "mounts", "hooks", "linux")
    version = top.need("version", str)
    if not version.startswith(("0.1.", "0.2.")):
        top.refuse("version", f"must be 0.1.x or 0.2.x beside a runtime.json, not {version!r}")
    platform, root, linux = top.object("platform"), top.object("root"), host.object("linux")
    _known(platform, "os", "arch")
    if platform.take("os", str, "linux") not in ("linux", ""):
        platform.refuse("os", f"must be linux, not {platform.value['os']!r}", NotSupported)
    platform.take("arch", str, "")
    _known(root, "path", "readonly")
    readonly = root.take("readonly", bool, False)
    _known(
        linux, "uidMappings", "gidMappings", "rlimits", "sysctl", "resources", "cgroupsPath", "namespaces", "devices",
        "apparmorProfile", "selinuxProcessLabel", "seccomp", "rootfsPropagation",
    )  # fmt: skip
    return {
        "ociVersion": "1.2.0",
        "process": _process(top, linux),
        "root": {"path": root.need("path", str), "readonly": readonly},
        **given(hostname=top.take("hostname", str, "")),
        "mounts": [_mount(entry, host.object("mounts"), readonly) for entry in top.objects("mounts")],
        **given(hooks=_hooks(host.object("hooks"))),
        "linux": _linux(linux),
    }


def _known(fields: Fields, *names: str) -> None:
    """Refuse fields that the two-file layout does not have, because its rules would ignore them."""
    for name in fields.value:
        if name not in names:
            fields.refuse(name, "is unknown in a two-file bundle (specification 0.1 and 0.2)")


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not empty, because Go wrote empty ones for fields that were not set."""
    return {name: value for name, value in values.items() if value not in ("", {}, [], None, False)}


def _process(top: Fields, linux: Fields) -> dict[str, Any]:
    process, portable = top.object("process"), top.object("linux")
    user = process.object("user")
    _known(process, "terminal", "user", "args", "env", "cwd")
    _known(user, "uid", "gid", "additionalGids")
    _known(portable, "capabilities")
    names = list(portable.strings("capabilities"))
    resources = linux.object("resources")
    score = {} if resources.value.get("oomScoreAdj") is None else {"oomScoreAdj": resources.need("oomScoreAdj", int)}
    gids: list[Any] = user.take("additionalGids", list, [])
    # Missing numbers are 0 in Go; config.parse checks the numbers themselves.
    return {
        "terminal": process.take("terminal", bool, False),
        "user": {"uid": user.take("uid", int, 0), "gid": user.take("gid", int, 0), **given(additionalGids=gids)},
        "args": list(process.strings("args")),
        **given(env=list(process.strings("env"))),
        "cwd": process.take("cwd", str, "") or "/",
        "capabilities": dict.fromkeys(_SETS, names),
        **given(
            rlimits=[_rlimit(entry) for entry in linux.objects("rlimits")],
            apparmorProfile=linux.take("apparmorProfile", str, ""),
            selinuxLabel=linux.take("selinuxProcessLabel", str, ""),
        ),
        **score,
    }


def _rlimit(entry: Fields) -> dict[str, Any]:
    _known(entry, "type", "soft", "hard")
    limits = {name: entry.natural(name, 0, largest=_U64_MAX) for name in ("soft", "hard")}
    return {"type": entry.need("type", str), **limits}


def _mount(point: Fields, mounts: Fields, readonly: bool) -> dict[str, Any]:
    _known(point, "name", "path")
    name, destination = point.need("name", str), point.need("path", str)
    if name not in mounts.value:
        point.refuse("name", f"{name!r} is not one of the mounts in runtime.json")
    entry = mounts.object(name)
    _known(entry, "type", "source", "options")
    kind, options = entry.take("type", str, ""), list(entry.strings("options"))
    if readonly and kind == "sysfs" and "ro" not in options:
        options.append("ro")
    mount = {"destination": destination, "type": kind, "source": entry.take("source", str, "")}
    return mount | given(options=options)


def _hooks(hooks: Fields) -> dict[str, Any]:
    _known(hooks, *HOOK_POINTS)
    return given(**{point: [_hook(entry) for entry in hooks.objects(point)] for point in HOOK_POINTS})


def _hook(entry: Fields) -> dict[str, Any]:
    _known(entry, "path", "args", "env")
    lists = {name: list(entry.strings(name)) for name in ("args", "env")}
    return {"path": entry.need("path", str), **given(**lists)}


def _linux(linux: Fields) -> dict[str, Any]:
    default = default_linux()
    namespaces = [_namespace(entry) for entry in linux.objects("namespaces")]
    mappings = {name: [_mapping(entry) for entry in linux.objects(name)] for name in ("uidMappings", "gidMappings")}
    if mappings["uidMappings"] and not any(entry["type"] == "user" for entry in namespaces):
        namespaces.append({"type": "user"})
    devices = [_device(entry) for entry in linux.objects("devices")]
    rules = [
        {"allow": True, "type": "c" if kind == "u" else kind, "major": major, "minor": minor, "access": access}
        for _, kind, major, minor, access in devices if kind != "p"
    ]  # fmt: skip
    resources = _resources(linux.object("resources"))
    resources["devices"] = default["resources"]["devices"] + rules
    return {
        "namespaces": [*namespaces, {"type": "cgroup"}],
        **given(**mappings),
        "resources": resources,
        **given(
            devices=[node for node, *_ in devices if node],
            cgroupsPath=linux.take("cgroupsPath", str, ""),
            sysctl=linux.string_map("sysctl"),
            rootfsPropagation=linux.take("rootfsPropagation", str, ""),
            seccomp=_seccomp(linux.object("seccomp")),
        ),
        "maskedPaths": default["maskedPaths"],
        "readonlyPaths": default["readonlyPaths"],
    }


def default_linux() -> dict[str, Any]:
    from runtime.spec.default import default_spec

    linux: dict[str, Any] = default_spec()["linux"]
    return linux


def _namespace(entry: Fields) -> dict[str, Any]:
    _known(entry, "type", "path")
    kind = entry.need("type", str)
    if kind not in ("pid", "network", "mount", "ipc", "uts", "user"):
        entry.refuse("type", f"{kind!r} must be pid, network, mount, ipc, uts or user")
    return {"type": kind, **given(path=entry.take("path", str, ""))}


def _mapping(entry: Fields) -> dict[str, Any]:
    names = ("containerID", "hostID", "size")
    _known(entry, *names)
    return {name: entry.natural(name, 0, largest=_ID_MAX) for name in names}


def _device(entry: Fields) -> tuple[dict[str, Any] | None, str, int, int, str]:
    """Return the node to make, if any, and the allowed use: type, major, minor (-1 for all), access."""
    _known(entry, "type", "path", "major", "minor", "permissions", "fileMode", "uid", "gid")
    kind = entry.value.get("type")
    if isinstance(kind, int) and not isinstance(kind, bool) and 0 <= kind < 128:
        kind = chr(kind)
    if kind not in _DEVICE_TYPES:
        entry.refuse("type", "must be c, b, u or p, or the number of that character")
    path, access = entry.take("path", str, ""), entry.take("permissions", str, "") or "rwm"
    major, minor = (-1 if entry.value.get(name) == -1 else entry.natural(name, 0) or 0 for name in ("major", "minor"))
    if not path:
        return None, kind, major, minor, access
    for name, number in (("major", major), ("minor", minor)):
        if number == -1:
            entry.refuse(name, "must be a number: -1 is for devices without path")
    node = {"path": path, "type": kind, "major": major, "minor": minor}
    given = [name for name in ("fileMode", "uid", "gid") if entry.value.get(name) is not None]
    node |= {name: entry.natural(name, largest=_ID_MAX) for name in given}
    return node, kind, major, minor, access


def _numbers(fields: Fields, *names: str) -> dict[str, int]:
    """Return the numbers that are set, neither missing nor 0; -1 is unlimited."""
    return {name: fields.value[name] for name in names if fields.take(name, int, 0)}


def _resources(resources: Fields) -> dict[str, Any]:
    _known(
        resources, "disableOOMKiller", "oomScoreAdj", "memory", "cpu", "pids", "blockIO", "hugepageLimits", "network"
    )  # fmt: skip
    memory, cpu, pids = resources.object("memory"), resources.object("cpu"), resources.object("pids")
    _known(memory, *MEMORY, "swappiness")
    _known(cpu, *CPU, *CPU_LISTS)
    _known(pids, "limit")
    limits: dict[str, Any] = dict(_numbers(memory, *MEMORY))
    # -1 (in 0.2, which has unsigned numbers, as its unsigned value) left it to the system; 0 is a value.
    if memory.take("swappiness", int, -1) not in (-1, _U64_MAX):
        limits["swappiness"] = memory.value["swappiness"]
    limits |= given(disableOOMKiller=resources.take("disableOOMKiller", bool, False))
    return given(
        memory=limits,
        cpu=_numbers(cpu, *CPU) | given(**{name: cpu.take(name, str, "") for name in CPU_LISTS}),
        pids=_numbers(pids, "limit"),
        blockIO=_block_io(resources.object("blockIO")),
        hugepageLimits=[_hugepages(entry) for entry in resources.objects("hugepageLimits")],
        network=_network(resources.object("network")),
    )


def _block_io(block: Fields) -> dict[str, Any]:
    throttles = _THROTTLES | _THROTTLES_01
    _known(block, *_WEIGHTS, *_WEIGHT_DEVICES, *throttles)
    found: dict[str, Any] = {_WEIGHTS[old]: number for old, number in _numbers(block, *_WEIGHTS).items()}
    for names, values in ((_WEIGHT_DEVICES, ("weight", "leafWeight")), (throttles, ("rate",))):
        for old, new in names.items():
            # 0.1 had one string here, in an undocumented format; an empty one stood for none.
            if block.value.get(old) not in (None, "", []):
                found[new] = [_block_device(entry, *values) for entry in block.objects(old)]
    return found


def _block_device(entry: Fields, *values: str) -> dict[str, Any]:
    _known(entry, "major", "minor", *values)
    return {name: entry.need(name, int) for name in ("major", "minor")} | {
        name: entry.natural(name, largest=_U64_MAX) for name in values if entry.value.get(name) is not None
    }


def _hugepages(entry: Fields) -> dict[str, Any]:
    _known(entry, "pageSize", "limit")
    return {"pageSize": entry.need("pageSize", str), "limit": entry.natural("limit", 0, largest=_U64_MAX)}


def _network(network: Fields) -> dict[str, Any]:
    _known(network, "classID", "classId", "priorities")
    name = "classID" if "classID" in network.value else "classId"
    text = network.take(name, str, "")
    try:
        number = int(text or "0", 0)
    except ValueError:
        number = -1
    if not 0 <= number <= _ID_MAX:
        network.refuse(name, f'must be a 32-bit number as a string, such as "0x100001", not {text!r}')
    return given(priorities=[_priority(entry) for entry in network.objects("priorities")]) | (
        {"classID": number} if number else {}
    )


def _priority(entry: Fields) -> dict[str, Any]:
    _known(entry, "name", "priority")
    return {"name": entry.need("name", str), "priority": entry.natural("priority", 0, largest=_ID_MAX)}


def _seccomp(seccomp: Fields) -> dict[str, Any]:
    _known(seccomp, "defaultAction", "architectures", "syscalls")
    action, syscalls = seccomp.take("defaultAction", str, ""), [_syscall(call) for call in seccomp.objects("syscalls")]
    architectures = list(seccomp.strings("architectures"))
    if not syscalls and action in ("", "SCMP_ACT_ALLOW"):
        return {}
    if not action:
        seccomp.refuse("defaultAction", "is missing: must be a string")
    return {"defaultAction": action, **given(architectures=architectures), "syscalls": syscalls}


def _syscall(call: Fields) -> dict[str, Any]:
    _known(call, "name", "action", "args")
    args = []
    for arg in call.objects("args"):
        _known(arg, "index", "value", "valueTwo", "op")
        numbers = {name: arg.natural(name, 0, largest=_U64_MAX) for name in ("index", "value", "valueTwo")}
        args.append({**numbers, "op": arg.need("op", str)})
    return {"names": [call.need("name", str)], "action": call.need("action", str), **given(args=args)}


def translate(message: str, config: dict[str, Any], runtime: dict[str, Any]) -> str:
    """Translate an error about the merged value, "config.json: FIELD: ...", to the file and field it came from.

    `config` and `runtime` are values that `merge` has accepted. A message of another form is returned unchanged.
    """
    import re

    found = re.match(r"config\.json: ([^:\s]+): ", message)
    if found is None:
        return message
    file, field = _place(found[1], config, runtime)
    return f"{file}: {field}: {message[found.end() :]}"


def _place(field: str, config: dict[str, Any], runtime: dict[str, Any]) -> tuple[str, str]:
    import re

    if found := re.fullmatch(r"process\.capabilities(?:\.[a-z]+)?(\[\d+\])?", field):
        return "config.json", f"linux.capabilities{found[1] or ''}"
    if found := re.match(r"mounts\[(\d+)\](?:\.(.+))?", field):
        if found[2] in (None, "destination"):
            return "config.json", f"mounts[{found[1]}].path"
        return "runtime.json", f"mounts.{config['mounts'][int(found[1])]['name']}.{found[2]}"
    devices = (runtime.get("linux") or {}).get("devices") or []
    if found := re.match(r"linux\.devices\[(\d+)\](.*)", field):
        places = [index for index, device in enumerate(devices) if device.get("path")]
        return "runtime.json", f"linux.devices[{places[int(found[1])]}]{found[2]}"
    if found := re.match(r"linux\.resources\.devices\[(\d+)\](.*)", field):
        number = int(found[1]) - len(default_linux()["resources"]["devices"])
        places = [index for index, device in enumerate(devices) if device.get("type") not in ("p", ord("p"))]
        place = f"linux.devices[{places[number]}]" if number >= 0 else "linux.devices"
        return "runtime.json", f"{place}{found[2].replace('.access', '.permissions')}"
    if found := re.match(r"linux\.resources\.blockIO\.([A-Za-z]+)(.*)", field):
        names = {new: old for old, new in BLOCK_IO.items()}
        return "runtime.json", f"linux.resources.blockIO.{names.get(found[1], found[1])}{found[2]}"
    for new, old in (
        ("process.rlimits", "linux.rlimits"),
        ("process.apparmorProfile", "linux.apparmorProfile"),
        ("process.selinuxLabel", "linux.selinuxProcessLabel"),
        ("process.oomScoreAdj", "linux.resources.oomScoreAdj"),
        ("linux.resources.memory.disableOOMKiller", "linux.resources.disableOOMKiller"),
        ("linux", "linux"),
        ("hooks", "hooks"),
    ):
        if field.startswith(new):
            return "runtime.json", old + field[len(new) :]
    return "config.json", "version" if field == "ociVersion" else field
