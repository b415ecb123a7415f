"""Split a present config.json into the two files of the OCI specification 0.2 (spec/two_file.py describes them).

The layout cannot express these, and `split` leaves them out because `two_file.merge` gives them back:
- the cgroup namespace, the default device rules, the default masked and read-only paths;
and these because the default config.json has them, although the container then gets other values:
- `process.noNewPrivileges`: it is false in a two-file container;
- an inheritable set that differs from the other sets: one list stands for all four.

Anything else that it cannot express is refused: domainname, annotations, other namespaces and masks, ambient
capabilities,
capability sets that differ, umask, hooks of other points and their timeout, id-mapped mounts, unified and rdma limits,
device rules that deny, flags of seccomp, and so on.
"""

from __future__ import annotations

from runtime.errors import NotSupported
from runtime.spec import two_file
from runtime.spec.fields import Fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_VERSION = "0.2.0"
_ARCHITECTURES = {
    "x86_64": "amd64", "i686": "386", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "ppc64le", "s390x": "s390x",
    "riscv64": "riscv64",
}  # fmt: skip


def split(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of config.json and runtime.json. config.parse must accept `value`. Raises NotSupported."""
    import os

    top = Fields(value, "config.json")
    process, root, linux = top.object("process"), top.object("root"), top.object("linux")
    user = process.object("user")
    _only(top, "ociVersion", "process", "root", "hostname", "mounts", "hooks", "linux")
    _only(
        process, "terminal", "user", "args", "env", "cwd", "capabilities", "rlimits", "noNewPrivileges",
        "apparmorProfile", "selinuxLabel", "oomScoreAdj",
    )  # fmt: skip
    _only(user, "uid", "gid", "additionalGids")
    _only(root, "path", "readonly")
    points, mounts = _mounts(top)
    machine = os.uname().machine
    config = {
        "version": _VERSION,
        "platform": {"os": "linux", "arch": _ARCHITECTURES.get(machine, machine)},
        "process": {
            name: process.value[name] for name in ("terminal", "user", "args", "env", "cwd") if name in process.value
        },
        "root": value["root"],
        **two_file.given(hostname=top.take("hostname", str, "")),
        "mounts": points,
        "linux": {"capabilities": _capabilities(process)},
    }
    hooks = top.object("hooks")
    _only(hooks, *two_file.HOOK_POINTS)
    for point in two_file.HOOK_POINTS:
        for hook in hooks.objects(point):
            _only(hook, "path", "args", "env")
    return config, {"mounts": mounts, "hooks": hooks.value, "linux": _linux(linux, process)}


def _only(fields: Fields, *names: str) -> None:
    for name, value in fields.value.items():
        if name not in names and value not in (None, {}, [], "", False):
            fields.refuse(name, "cannot be expressed in a two-file bundle", NotSupported)


def _mounts(top: Fields) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Return the mount points in order, and the mounts by name: the path's last part, numbered if it is taken."""
    points: list[dict[str, str]] = []
    mounts: dict[str, Any] = {}
    for index, entry in enumerate(top.objects("mounts")):
        _only(entry, "destination", "type", "source", "options")
        path = entry.need("destination", str)
        name = path.rstrip("/").rpartition("/")[2] or "root"
        name = name if name not in mounts else f"{name}-{index}"
        points.append({"name": name, "path": path})
        mounts[name] = {key: item for key, item in entry.value.items() if key != "destination"}
    return points, mounts


def _capabilities(process: Fields) -> list[str]:
    sets = process.object("capabilities")
    if not sets.value:
        process.refuse("capabilities", "is missing: a two-file bundle without a list has none", NotSupported)
    _only(sets, "bounding", "effective", "permitted", "inheritable")
    names = sets.strings("bounding")
    for name in ("effective", "permitted"):
        if set(sets.strings(name)) != set(names):
            sets.refuse(name, "differs from bounding: a two-file bundle has one set", NotSupported)
    return list(names)


def _linux(linux: Fields, process: Fields) -> dict[str, Any]:
    same = ("uidMappings", "gidMappings", "sysctl", "cgroupsPath", "rootfsPropagation")
    _only(linux, *same, "namespaces", "resources", "devices", "seccomp", "maskedPaths", "readonlyPaths")
    default = two_file.default_linux()
    for name in ("maskedPaths", "readonlyPaths"):
        if set(linux.strings(name)) != set(default[name]):
            linux.refuse(name, "differs from the default, which a two-file bundle always has", NotSupported)
    namespaces = list(linux.objects("namespaces"))
    if {"type": "cgroup"} not in (entry.value for entry in namespaces):
        linux.refuse("namespaces", "has no new cgroup namespace, which a two-file bundle always has", NotSupported)
    resources = _resources(linux.object("resources"))
    if process.value.get("oomScoreAdj") is not None:
        resources["oomScoreAdj"] = process.value["oomScoreAdj"]
    return {
        "namespaces": [entry.value for entry in namespaces if entry.value.get("type") != "cgroup"],
        "devices": _devices(linux, default["resources"]["devices"]),
        "resources": resources,
        **two_file.given(
            **{name: linux.value.get(name) for name in same},
            rlimits=[entry.value for entry in process.objects("rlimits")],
            apparmorProfile=process.take("apparmorProfile", str, ""),
            selinuxProcessLabel=process.take("selinuxLabel", str, ""),
            seccomp=_seccomp(linux.object("seccomp")),
        ),
    }


def _devices(linux: Fields, default: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return device nodes with the rule that allows their use, and rules without a node."""
    found = []
    rules = list(linux.object("resources").objects("devices"))
    if [rule.value for rule in rules[: len(default)]] != default:
        linux.object("resources").refuse("devices", "must begin with the default rules", NotSupported)
    for rule in rules[len(default) :]:
        if not rule.take("allow", bool, False) or rule.value.get("type") not in ("c", "b"):
            rule.refuse("", "a two-file bundle can express only rules that allow devices of type c or b", NotSupported)
        numbers = {name: -1 if rule.value.get(name) is None else rule.value[name] for name in ("major", "minor")}
        found.append({"type": ord(rule.value["type"]), **numbers, "permissions": rule.take("access", str, "rwm")})
    for node in linux.objects("devices"):
        kind = "c" if node.value.get("type") == "u" else node.need("type", str)
        device = {"type": ord(kind), **{name: node.take(name, int, 0) for name in ("major", "minor")}}
        rule_of = next((entry for entry in found if "path" not in entry and device.items() <= entry.items()), None)
        usual = any(_allows(rule, kind, device) for rule in default)
        if kind != "p" and rule_of is None and not usual:
            node.refuse(
                "path", "no rule in linux.resources.devices allows it, but a two-file bundle would", NotSupported
            )
        target = device | {"permissions": "rwm"} if rule_of is None else rule_of
        target |= {name: item for name, item in node.value.items() if name not in ("type", "major", "minor")}
        if rule_of is None:
            found.append(target)
    return found


def _allows(rule: dict[str, Any], kind: str, device: dict[str, Any]) -> bool:
    """Return whether one of the default rules allows a device."""
    numbers = all(rule.get(name) in (None, device[name]) for name in ("major", "minor"))
    return numbers and rule["allow"] and rule["type"] == kind and rule["access"] == "rwm"


def _resources(resources: Fields) -> dict[str, Any]:
    memory, cpu, block = resources.object("memory"), resources.object("cpu"), resources.object("blockIO")
    _only(resources, "memory", "cpu", "pids", "blockIO", "hugepageLimits", "network", "devices")
    _only(memory, *two_file.MEMORY, "swappiness", "disableOOMKiller")
    _only(cpu, *two_file.CPU, *two_file.CPU_LISTS)
    names = {new: old for old, new in two_file.BLOCK_IO.items()}
    _only(block, *names)
    network = dict(resources.object("network").value)
    if network.get("classID") is not None:
        network["classID"] = hex(network["classID"])
    return two_file.given(
        disableOOMKiller=memory.take("disableOOMKiller", bool, False),
        memory={name: item for name, item in memory.value.items() if name != "disableOOMKiller"},
        blockIO={names[name]: item for name, item in block.value.items() if name in names},
        network=network,
        **{name: resources.value.get(name) for name in ("cpu", "pids", "hugepageLimits")},
    )


def _seccomp(seccomp: Fields) -> dict[str, Any]:
    _only(seccomp, "defaultAction", "architectures", "syscalls")
    calls = []
    for call in seccomp.objects("syscalls"):
        _only(call, "names", "action", "args")
        rest = {name: item for name, item in call.value.items() if name != "names"}
        calls += [{"name": name, **rest} for name in call.strings("names")]
    return two_file.given(**{**seccomp.value, "syscalls": calls}) if seccomp.value else {}
