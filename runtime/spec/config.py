"""Parse config.json of an OCI bundle (runtime-spec 1.2) into frozen records.

A feature that this version lacks is rejected with the field's path, never ignored silently.
"""

from __future__ import annotations

import os

from runtime.errors import NotSupported, SpecError
from runtime.light import json as light_json
from runtime.light.records import Record
from runtime.spec.annotations import NET
from runtime.spec.fields import Fields
from runtime.spec.mounts import PROPAGATIONS, Device, IdMapping, Mount, parse_device, parse_mappings, parse_mount
from runtime.spec.process import Process, parse_process
from runtime.spec.resources import Resources, parse_resources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from runtime.spec.network import Network
    from runtime.spec.seccomp import Seccomp

NAMESPACES = ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")
CONFIG = "config.json"
HOOK_POINTS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
PERSONALITIES = {"LINUX": 0x0000, "LINUX32": 0x0008}


class Hook(Record):
    """One hook; `timeout` in seconds."""

    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout: float | None


class Spec(Record):
    """One config.json, whose value is `config`.

    `namespaces` maps a type to the path to join, or None for a new one; `time_offsets` a clock ("monotonic",
    "boottime") to seconds and nanoseconds; `root` is absolute.
    """

    config: dict[str, Any]
    oci_version: str
    process: Process
    root: str
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
    seccomp: Seccomp | None
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    time_offsets: dict[str, tuple[int, int]] = {}
    personality: int | None = None
    mount_label: str | None = None
    network: Network | None = None  # on a bridge of the host (spec/network.py)

    def is_new(self, kind: str) -> bool:
        """Return whether the container gets a new namespace of this type."""
        return kind in self.namespaces and self.namespaces[kind] is None


def load(bundle: str | Path, annotations: dict[str, str] | None = None, *, net: str | None = None) -> Spec:
    """Return the spec in force for a container of a bundle. Raises SpecError naming file and field.

    `annotations`: those in the state of an existing container, which hold later decisions that the bundle lacks. `net`:
    the value of --net.
    """
    return in_force(load_bundle(bundle), annotations, net)


def in_force(spec: Spec, annotations: dict[str, str] | None, net: str | None) -> Spec:
    """Return the spec with an existing container's annotations, and with the network of `net` or the annotations."""
    if annotations is not None:
        spec = spec.replace(annotations=annotations)
    text = spec.annotations.get(NET)
    if net is None and text is None:
        return spec
    if net is not None:
        return apply(spec, net, "--net")
    return apply(spec, text or "", f"annotations.{NET}")


def load_bundle(bundle: str | Path) -> Spec:
    value = read_json(os.path.join(bundle, CONFIG), "is this the bundle? `pymigrate spec` writes a config.json")
    if isinstance(value, dict) and "ociVersion" not in value:
        from runtime.spec import two_file

        if two_file.is_two_file(bundle):
            host = read_json(os.path.join(bundle, "runtime.json"), "")
            merged = two_file.merge(value, host)
            try:
                return parse(merged, bundle)
            except SpecError as error:
                raise type(error)(two_file.translate(str(error), value, host)) from None
    return parse(value, bundle)


def read_json(path: str, remedy: str) -> Any:
    """Return the value of a JSON file of a bundle. Raises SpecError."""
    try:
        with open(path, "rb") as file:
            return light_json.loads(file.read())
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file or directory", remedy=remedy or None) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path}: is not JSON: {error}") from None


def parse(value: Any, bundle: str | Path) -> Spec:
    """Validate the value of a config.json that belongs to `bundle`; return the spec. Raises SpecError."""
    top = Fields(value, "config.json")
    version = top.need("ociVersion", str)
    if not _is_version(version):
        top.refuse("ociVersion", f"must be 1.x.y, not {version!r}")
    root, linux = top.object("root"), top.object("linux")
    top.unsupported("vm", "windows", "solaris", "zos", "freebsd")
    linux.unsupported("intelRdt", "netDevices", "memoryPolicy")
    top.need("process", dict)
    rootfs = root.need("path", str)
    if not rootfs:
        root.refuse("path", "must not be empty")
    spaces = _namespaces(linux)
    uids, gids = (parse_mappings(linux, name) for name in ("uidMappings", "gidMappings"))
    _check_mappings(linux, spaces, uids, gids)
    mounts = tuple(parse_mount(entry, bundle) for entry in top.objects("mounts"))
    for index, mount in enumerate(mounts):
        if mount.idmap and not (mount.uid_mappings or uids):
            top.refuse(
                f"mounts[{index}].options",
                f"{mount.idmap} needs mappings: neither the mount nor a new user namespace has any",
            )
    return Spec(
        config=top.value,
        oci_version=version,
        process=parse_process(top.object("process")),
        root=os.path.abspath(os.path.join(bundle, rootfs)),
        readonly=root.take("readonly", bool, False),
        hostname=top.take("hostname", str, "") or None,
        domainname=top.take("domainname", str, "") or None,
        mounts=mounts,
        namespaces=spaces,
        hooks={point: tuple(_hook(entry) for entry in top.object("hooks").objects(point)) for point in HOOK_POINTS},
        annotations=_annotations(top),
        masked_paths=linux.paths("maskedPaths"),
        readonly_paths=linux.paths("readonlyPaths"),
        cgroups_path=_cgroups_path(linux),
        resources=parse_resources(linux.object("resources")),
        devices=tuple(parse_device(entry) for entry in linux.objects("devices")),
        sysctl=linux.string_map("sysctl"),
        rootfs_propagation=linux.choice("rootfsPropagation", PROPAGATIONS) or None,
        seccomp=_seccomp(linux),
        uid_mappings=uids,
        gid_mappings=gids,
        time_offsets=_time_offsets(linux, spaces),
        personality=_personality(linux),
        mount_label=linux.take("mountLabel", str, "") or None,
    )


def _annotations(top: Fields) -> dict[str, str]:
    found = top.string_map("annotations")
    if "" in found:
        top.refuse("annotations", "a key must not be empty")
    return found


def _is_version(text: str) -> bool:
    """Return whether a version is 1.x.y, with or without a suffix such as -dev."""
    parts = text.split("-")[0].split("+")[0].split(".")
    return len(parts) == 3 and parts[0] == "1" and all(part.isascii() and part.isdigit() for part in parts)


def _namespaces(linux: Fields) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for entry in linux.objects("namespaces"):
        kind = entry.need("type", str)
        if kind not in NAMESPACES:
            entry.refuse("type", f"{kind!r} is unknown: must be one of {', '.join(NAMESPACES)}")
        if kind in found:
            entry.refuse("type", f"{kind!r} is given twice")
        path = entry.take("path", str, "") or None
        if path is not None and not path.startswith("/"):
            entry.refuse("path", "must be absolute")
        if path is not None and kind == "mount":
            entry.refuse(
                "path", "joining a mount namespace is not supported: its other processes would get this root",
                NotSupported,
            )  # fmt: skip
        found[kind] = path
    if "mount" not in found:
        linux.refuse("namespaces", "must include type mount: without it the host's own root would be changed")
    return found


def _check_mappings(
    linux: Fields, spaces: dict[str, str | None], uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]
) -> None:
    new = "user" in spaces and spaces["user"] is None
    if "user" in spaces and spaces.get("pid") is not None:
        # In a user namespace, root of the joined container could trace the init until its mounts are made.
        linux.refuse(
            "namespaces", "joining a pid namespace together with a user namespace is not supported", NotSupported
        )
    for name, mappings in (("uidMappings", uids), ("gidMappings", gids)):
        if new and not mappings:
            linux.refuse(name, "is missing: a new user namespace needs mappings")
        if mappings and not new:
            linux.refuse(name, "needs a new user namespace in linux.namespaces")


def _time_offsets(linux: Fields, spaces: dict[str, str | None]) -> dict[str, tuple[int, int]]:
    offsets, found = linux.object("timeOffsets"), {}
    for clock in offsets.value:
        if clock not in ("monotonic", "boottime"):
            offsets.refuse(clock, "must be monotonic or boottime")
        entry = offsets.object(clock)
        seconds = entry.number("secs", 0, smallest=-(2**62), largest=2**62) or 0
        found[clock] = (seconds, entry.natural("nanosecs", 0, largest=999_999_999) or 0)
    if found and not ("time" in spaces and spaces["time"] is None):
        linux.refuse("timeOffsets", "needs a new time namespace in linux.namespaces")
    return found


def _personality(linux: Fields) -> int | None:
    if not linux.has("personality"):
        return None
    value = linux.object("personality")
    value.unsupported("flags")
    domain = value.choice("domain", PERSONALITIES)
    if not domain:
        value.refuse("domain", f"is missing: must be one of {', '.join(PERSONALITIES)}")
    return PERSONALITIES[domain]


def _seccomp(linux: Fields) -> Seccomp | None:
    if not linux.take("seccomp", dict, {}):
        return None
    from runtime.spec import seccomp

    return seccomp.parse(linux.object("seccomp"))


def _hook(entry: Fields) -> Hook:
    path = entry.need("path", str)
    if not path.startswith("/"):
        entry.refuse("path", "must be absolute")
    timeout = entry.natural("timeout", largest=2**31 - 1)
    if timeout == 0:
        entry.refuse("timeout", "must be greater than 0")
    return Hook(path, entry.strings("args") or (path,), entry.strings("env"), timeout)


def _cgroups_path(linux: Fields) -> str | None:
    """Return a path, or slice:prefix:name for systemd's driver; making the cgroup checks which of the two fits."""
    path = linux.take("cgroupsPath", str, "") or None
    parts = set((path or "").split("/")) - {"", "."}
    if path is not None and (not parts or ".." in parts):
        linux.refuse("cgroupsPath", "must be a path without .. to a cgroup below the root")
    return path


def apply(spec: Spec, text: str, where: str) -> Spec:
    """Return the spec with the network in `text`, also in its annotations. Raises SpecError naming `where`."""
    spaces: dict[str, str | None] = dict(spec.namespaces)
    network = None
    if text == "host":
        spaces.pop("network", None)
    elif text == "none":
        spaces["network"] = None
    elif text.startswith(("ns:", "/")):
        path = text.removeprefix("ns:")
        if not path.startswith("/") or "\0" in path:
            raise SpecError(f"{where}: {text[:80]!r}: the path of a namespace must be absolute")
        spaces["network"], text = path, f"ns:{path}"
    else:
        from runtime.spec import network as networks

        network = networks.parse(text, where)
        spaces["network"], text = None, network.text()
    return spec.replace(namespaces=spaces, network=network, annotations={**spec.annotations, NET: text})


def with_mac(spec: Spec) -> Spec:
    """Return the spec with a hardware address for its network; choose a random one unless it has one."""
    if spec.network is None or spec.network.mac is not None:
        return spec
    first, *rest = os.urandom(6)
    mac = ":".join(f"{byte:02x}" for byte in (first & 0xFC | 0x02, *rest))  # locally administered, unicast
    network = spec.network.replace(mac=mac)
    return spec.replace(network=network, annotations={**spec.annotations, NET: network.text()})


def elsewhere(spec: Spec, text: str | None) -> Spec:
    """Return the spec for another host, on the bridge in `text` ("bridge=NAME"). Raises SpecError."""
    if text is None:
        return spec
    if spec.network is None:
        raise SpecError(f"--net {text[:80]!r}: the container is not on a bridge")
    from runtime.spec.network import convert

    key, _, value = text.partition("=")
    bridge = convert("bridge", value) if key == "bridge" else None
    if not isinstance(bridge, str):
        raise SpecError(f"--net {text[:80]!r}: must be bridge=NAME; the container keeps its addresses")
    network = spec.network.replace(bridge=bridge)
    return spec.replace(network=network, annotations={**spec.annotations, NET: network.text()})
