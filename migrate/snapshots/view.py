"""List what a restore of a snapshot does on this host: what its config.json runs, opens and gives to the container."""

from collections.abc import Iterator

from runtime.linux.mount_flags import MS_RDONLY
from runtime.spec.config import Spec
from runtime.spec.mounts import parse_options
from runtime.spec.resources import DeviceRule


def demands(spec: Spec) -> Iterator[tuple[str, str]]:
    """Yield (kind, line): the program, hooks, binds, joined namespaces, devices, capabilities, sysctls."""
    process = spec.process
    where = "in a user namespace" if "user" in spec.namespaces else "of this host"
    yield "program", f"{' '.join(process.args)} (as user {process.uid}, group {process.gid} {where})"
    for point, hooks in spec.hooks.items():
        for hook in hooks:
            yield "hook", f"{point}: {' '.join([hook.path, *hook.args[1:]])} (runs here, as the user who restores it)"
    for mount in spec.mounts:
        if mount.is_bind:
            mode = "read-only" if parse_options(mount.options).flags & MS_RDONLY else "writable"
            yield "bind", f"{mount.source} at {mount.destination}, {mode}"
    for kind, path in spec.namespaces.items():
        if path is not None:
            yield "namespace", f"{kind}: the one at {path}"
    for kind in ("mount", "network", "pid", "ipc", "uts", "cgroup"):
        if kind not in spec.namespaces:
            yield "namespace", f"{kind}: this host's own"
    if spec.network is not None:
        yield "network", spec.network.text()
    for device in spec.devices:
        yield "device", f"{device.path} ({device.type} {device.major}:{device.minor})"
    for rule in spec.resources.devices:
        if rule.allow:
            yield "device", f"may use {_devices(rule)}"
    names = sorted((process.capabilities or {}).get("bounding", ()))
    yield "may", ", ".join(names) or "no more than any user (no capabilities)"
    for name, value in spec.sysctl.items():
        yield "sysctl", f"{name}={value}"


def _devices(rule: DeviceRule) -> str:
    major, minor = ("*" if number is None else str(number) for number in (rule.major, rule.minor))
    return f"{rule.type} {major}:{minor} {rule.access}"
