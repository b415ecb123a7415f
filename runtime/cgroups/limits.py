"""Set the limits of a cgroup: the writes that v1.py and v2.py compute, in an order that the kernel accepts."""

from __future__ import annotations

import errno
import os

from runtime.cgroups.hierarchies import UNIFIED
from runtime.errors import ContainerError
from runtime.linux import trusted
from runtime.linux.files import read, write
from runtime.spec.resources import DeviceRule

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from runtime.cgroups.v1 import Write
    from runtime.spec.resources import Resources

    Paths = dict[str, str]

_DENY_ALL = DeviceRule(False, "a", None, None, "rwm")
# The devices that every container can use (runtime-spec, default devices; runc allows the same). These rules come after
# those of config.json. A node can always be made, but making it does not allow opening the device.
DEFAULT_DEVICES = tuple(
    DeviceRule(True, *rule)
    for rule in (
        ("c", None, None, "m"), ("b", None, None, "m"), ("c", 1, 3, "rwm"), ("c", 1, 5, "rwm"), ("c", 1, 7, "rwm"),
        ("c", 1, 8, "rwm"), ("c", 1, 9, "rwm"), ("c", 5, 0, "rwm"), ("c", 5, 2, "rwm"), ("c", 136, None, "rwm"),
    )
)  # fmt: skip


def apply(paths: Paths, resources: Resources) -> None:
    """Set the limits in the directories `paths` (Cgroup.paths). Raises ContainerError naming field and file."""
    if set(paths) == {UNIFIED}:
        from runtime.cgroups import v2

        _write_all(paths, v2.writes(resources, paths[UNIFIED]))
    else:
        from runtime.cgroups import v1

        _write_all(paths, v1.writes(resources, paths))
    _write_all(paths, ((f"unified.{key}", UNIFIED, key, value) for key, value in resources.unified.items()))
    if resources.devices:
        _apply_devices(paths, device_rules(resources.devices))


def device_rules(rules: Sequence[DeviceRule]) -> tuple[DeviceRule, ...]:
    """Return the effective rules for those of a config.json: as in runc, devices without a rule are denied."""
    closed = any(rule.type == "a" for rule in rules)
    return (*(() if closed else (_DENY_ALL,)), *rules, *DEFAULT_DEVICES)


def may_deny_devices() -> bool:
    """Whether the kernel accepts device rules from us: not from a user, nor from root of a user namespace."""
    return not os.geteuid() and not trusted.is_remapped()


def denied_by_default(resources: Resources) -> Resources:
    """Return the limits of a new container: without device rules it may use only the default devices."""
    return resources if resources.devices else resources.replace(devices=(_DENY_ALL,))


def _apply_devices(paths: Paths, rules: Sequence[DeviceRule]) -> None:
    if "devices" in paths:
        from runtime.cgroups import v1

        try:
            current = read(f"{paths['devices']}/devices.list")
        except OSError as error:
            raise ContainerError(f"linux.resources.devices: cannot read devices.list: {error.strerror}") from None
        _write_all(paths, v1.device_writes(rules, current))
    elif UNIFIED in paths:
        from runtime.cgroups import devices

        devices.apply(paths[UNIFIED], rules)
    else:
        raise ContainerError("linux.resources.devices: this host does not have a devices cgroup")


def _write_all(paths: Paths, writes: Iterable[Write]) -> None:
    """Write in the given order, then retry what the kernel has refused.

    Limits depend on each other (memory and swap, quota and period and burst), and which one is to be first depends on
    whether they rise or fall.
    """
    pending = list(writes)
    while pending:
        refused: list[tuple[Write, OSError]] = []
        for one in pending:
            try:
                _write(paths, *one)
            except OSError as error:
                refused.append((one, error))
                if error.errno not in (errno.EINVAL, errno.EBUSY):
                    raise _refusal(one, error) from None
        if len(refused) == len(pending):
            raise _refusal(*refused[0])
        pending = [one for one, _ in refused]


def _write(paths: Paths, field: str, controller: str, file: str, value: str) -> None:
    directory = paths.get(controller)
    if directory is None:
        raise ContainerError(f"linux.resources.{field}: this host has no {controller or 'version 2'} cgroup")
    try:
        write(f"{directory}/{file}", value)
    except FileNotFoundError:
        raise ContainerError(
            f"linux.resources.{field}: there is no {file} in {directory}",
            remedy="the kernel lacks that controller, or (version 2) it is not delegated to that cgroup",
        ) from None


def _refusal(one: Write, error: OSError) -> ContainerError:
    field, _, file, value = one
    return ContainerError(f"linux.resources.{field}: cannot write {value!r} to {file}: {error.strerror}")
