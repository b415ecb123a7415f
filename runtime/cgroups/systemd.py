"""The systemd driver: a container's cgroup is a transient unit.

Sources: org.freedesktop.systemd1(5), systemd.resource-control(5), systemd's CGROUP_DELEGATION.md. The limits are set in
the unit as well as in the files, because systemd writes its values again, for example at a daemon-reload.
"""

from __future__ import annotations

import os

from runtime.cgroups import v1, v2
from runtime.cgroups.dbus import Refused, Systemd
from runtime.cgroups.limits import device_rules
from runtime.errors import Conflict, ContainerError, NotSupported, SpecError, StartFailed
from runtime.light import signals
from runtime.light.records import Record
from runtime.limits import SCOPE_PLACE_TIMEOUT
from runtime.linux.files import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Self

    from runtime.spec.resources import DeviceRule, Resources

    Properties = dict[str, tuple[str, Any]]  # name to D-Bus signature and value

ANNOTATION = "org.systemd.property."
_INFINITY = 2**64 - 1
_PERIOD = 100_000  # the kernel's own, in microseconds
_SECOND = 1_000_000
_PERCENT = _SECOND // 100


def expand_slice(name: str) -> str:
    """Return the path of a slice's cgroup: a-b.slice is in a.slice. Raises ValueError.

    >>> expand_slice("a-b.slice")
    'a.slice/a-b.slice'
    """
    stem = name.removesuffix(".slice")
    if name == "-.slice":
        return ""
    if stem == name or not _is_unit_name(name) or "" in stem.split("-"):
        raise ValueError(f"{name!r} is not a slice name")
    parts = stem.split("-")
    return "/".join(f"{'-'.join(parts[: end + 1])}.slice" for end in range(len(parts)))


def _is_unit_name(name: str) -> bool:
    plain = name.translate({ord(letter): None for letter in ":-_.\\"})
    return bool(plain) and plain.isascii() and plain.isalnum() and len(name) < 256


class UnitName(Record):
    """A unit and its slice."""

    slice: str
    unit: str

    @classmethod
    def parse(cls, container_id: str, cgroups_path: str | None) -> Self:
        """Parse slice:prefix:name as prefix-name.scope, or as `name` itself if that is a slice. Raises SpecError."""
        place = f"config.json: linux.cgroupsPath: {cgroups_path!r}"
        parts = (cgroups_path or f":pymigrate:{container_id}").split(":")
        if len(parts) != 3 or not parts[2]:
            raise SpecError(f"{place}: must be slice:prefix:name if systemd makes the cgroup")
        lies_in, prefix, name = parts
        lies_in = lies_in or "system.slice"
        unit = name if name.endswith(".slice") else "-".join(filter(None, (prefix, name))) + ".scope"
        try:
            expand_slice(lies_in)
            if unit.endswith(".slice"):
                expand_slice(unit)
        except ValueError as error:
            raise SpecError(f"{place}: {error}") from None
        if not _is_unit_name(unit):
            raise SpecError(f"{place}: {unit!r} cannot be the name of a unit")
        return cls(lies_in, unit)

    @property
    def is_slice(self) -> bool:
        return self.unit.endswith(".slice")


def monitor_unit(unit: str) -> str:
    """Return the scope of the monitor of a container's unit. Container ids have no colon."""
    return f"{unit.rpartition('.')[0]}:monitor.scope"


def start(
    name: UnitName, pid: int | None, resources: Resources | None, annotations: Mapping[str, str], *, unified: bool
) -> str:
    """Start the container's unit with `pid` in it. Return its cgroup, relative to the root of the hierarchy.

    Raises SpecError for an annotation that cannot be a property, Conflict if the unit exists, StartFailed.
    """
    properties = _basic(name, f"pymigrate container {name.unit}", pid)
    properties["Delegate"] = ("b", True)
    if name.is_slice:
        del properties["Delegate"]  # a slice has other units
    if resources is not None:
        properties |= resource_properties(resources, "" if unified else None)
    properties |= annotated(annotations)
    with Systemd() as systemd:
        _start(systemd, name, properties)
    return expand_slice(name.unit) if name.is_slice or pid is None else _cgroup_of(pid, name)


def start_monitor(unit: str, lies_in: str, pid: int) -> None:
    """Start a scope beside the container's unit for its monitor. Raises ContainerError."""
    name = UnitName(lies_in, monitor_unit(unit))
    with Systemd() as systemd:
        _start(systemd, name, _basic(name, f"pymigrate monitor of {unit}", pid))


def _basic(name: UnitName, description: str, pid: int | None) -> Properties:
    properties: Properties = {"Description": ("s", description), "DefaultDependencies": ("b", False)}
    if name.is_slice:
        properties["Wants"] = ("as", [name.slice])
    else:
        properties["Slice"] = ("s", name.slice)
        # Otherwise the unit would stay after its processes were killed, and its name could not be used again.
        properties["CollectMode"] = ("s", "inactive-or-failed")
        if pid is None:
            raise StartFailed(f"{name.unit}: systemd cannot make a scope without a process")
        properties["PIDs"] = ("au", [pid])
    for controller in ("Memory", "CPU", "IO", "Tasks"):
        properties[f"{controller}Accounting"] = ("b", True)
    return properties


def _start(systemd: Systemd, name: UnitName, properties: Properties) -> None:
    arguments: tuple[Any, ...] = (name.unit, "replace", list(properties.items()), [])
    for attempt in (1, 2):
        try:
            (job,) = systemd.call("StartTransientUnit", "ssa(sv)a(sa(sv))", arguments)
            break
        except Refused as error:
            if error.name == "UnitExists":
                if name.is_slice:
                    return
                if attempt == 1:  # it may be a failed unit that has not been reset
                    _reset_failed(systemd, name.unit)
                    continue
                raise Conflict(
                    f"systemd has a unit {name.unit} already", remedy="set linux.cgroupsPath to another name"
                ) from None
            raise StartFailed(f"systemd does not start {name.unit}: {error}") from None
    result = systemd.wait(job)
    if result != "done":
        _reset_failed(systemd, name.unit)
        raise StartFailed(f"systemd does not start {name.unit}: the job's result is {result!r}")


def _reset_failed(systemd: Systemd, unit: str) -> None:
    try:
        systemd.call("ResetFailedUnit", "s", (unit,))
    except Refused:  # it has not failed, or does not exist
        return


def _cgroup_of(pid: int, name: UnitName) -> str:
    """Return a process's cgroup in systemd's hierarchy as we see it: version 2, or name=systemd of version 1."""
    try:
        lines = read(f"/proc/{pid}/cgroup").splitlines()
    except OSError as error:
        raise StartFailed(f"the process {pid} of {name.unit} has ended: {error.strerror}") from None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("name=systemd", "") and path.endswith(f"/{name.unit}"):
            return path
    raise StartFailed(f"the process {pid} is not in {name.unit}")


def set_properties(unit: str, resources: Resources, directory: str | None) -> None:
    """Update the limits in systemd's unit. `directory` is the version 2 cgroup, None on version 1."""
    properties = resource_properties(resources, directory)
    if not properties:
        return
    items = list(properties.items())
    if "DeviceAllow" in properties:
        items.insert(0, ("DeviceAllow", ("a(ss)", [])))  # otherwise systemd adds to the list
    with Systemd() as systemd:
        try:
            # "runtime": the properties last until the next boot, as the unit does.
            systemd.call("SetUnitProperties", "sba(sv)", (unit, True, items))
        except Refused as error:
            raise ContainerError(f"linux.resources: systemd refuses the limits of {unit}: {error}") from None


def stop(*units: str) -> None:
    """Stop units and remove them from systemd; harmless if they do not exist. Raises ContainerError."""
    with Systemd() as systemd:
        for unit in units:
            try:
                (job,) = systemd.call("StopUnit", "ss", (unit, "replace"))
                systemd.wait(job)
            except Refused as error:
                if error.name != "NoSuchUnit":
                    raise ContainerError(f"systemd does not stop {unit}: {error}") from None
            _reset_failed(systemd, unit)


def resource_properties(resources: Resources, directory: str | None) -> Properties:
    """Limits as properties of a unit.

    `directory` is the version 2 cgroup that they are for (its files tell what the resources leave open), "" when it is
    not there yet, None on version 1, which has other properties. Raises ContainerError.
    """
    files = _v2_files(resources, directory) if directory is not None else _v1_files(resources)
    files |= resources.unified
    try:
        properties = _properties(files, directory)
    except ValueError as error:
        raise ContainerError(f"linux.resources.unified: cannot be told to systemd: {error}") from None
    # On version 2 systemd leaves the program alone that holds the cgroup to its device rules; devices.allow it writes.
    return properties if directory is not None else properties | _device_properties(resources.devices)


def _device_properties(rules: Sequence[DeviceRule]) -> Properties:
    """The device rules as a list of what is allowed. Raises NotSupported."""
    if not rules:
        return {}
    rules = device_rules(rules)
    if all(rule.allow for rule in rules):
        return {}
    allowed = v1.allow_list(rules)
    if allowed is None:
        raise NotSupported("linux.resources.devices: systemd cannot deny some devices only", remedy="deny all first")
    entries = []
    for device, access in allowed.items():
        kind, _, numbers = device.partition(" ")
        major, _, minor = numbers.partition(":")
        name = {"c": "char", "b": "block"}[kind]
        if minor == "*":
            entries.append((f"{name}-{major}", access))
        elif major == "*":
            raise NotSupported(f"linux.resources.devices: systemd cannot allow {device}, whatever its major number")
        else:
            entries.append((f"/dev/{name}/{major}:{minor}", access))
    return {"DevicePolicy": ("s", "strict"), "DeviceAllow": ("a(ss)", [entry for entry in entries if entry[1]])}


def _properties(files: Mapping[str, str], directory: str | None) -> Properties:
    properties: Properties = {}
    for file, name in _NUMBERS.items():
        value = files.get(file, "").strip()
        if value:
            properties[name] = ("t", _INFINITY if value == "max" or value.startswith("-") else int(value))
    for file, name in (("cpuset.cpus", "AllowedCPUs"), ("cpuset.mems", "AllowedMemoryNodes")):
        if files.get(file, "").strip():
            properties[name] = ("ay", _bits(files[file]))
    if properties.get("TasksMax") == ("t", 0):
        properties["TasksMax"] = ("t", 1)  # systemd does not accept 0
    if files.get("cpu.idle") == "1":
        properties["CPUWeight"] = ("t", 0)  # systemd's value for idle
    properties |= _bandwidth(files.get("cpu.max", ""), directory)
    return properties


_NUMBERS = {
    "memory.max": "MemoryMax",
    "memory.low": "MemoryLow",
    "memory.high": "MemoryHigh",
    "memory.min": "MemoryMin",
    "memory.swap.max": "MemorySwapMax",
    "cpu.weight": "CPUWeight",
    "pids.max": "TasksMax",
    "io.weight": "IOWeight",
    "memory.limit_in_bytes": "MemoryLimit",
    "cpu.shares": "CPUShares",
}


def _v2_files(resources: Resources, directory: str) -> dict[str, str]:
    """Return the coming contents of the files by name."""
    writes = v2.writes(resources, directory or "/nonexistent")
    files = {file: value for _, _, file, value in writes if ":" not in value}  # not those of single devices
    if "io.bfq.weight" in files:  # systemd derives it from IOWeight: 1 to 100 unchanged, the rest in steps of 11
        weight = int(files["io.bfq.weight"])
        files["io.weight"] = str(weight if weight <= 100 else 100 + 11 * (weight - 100))
    swap = v2.swap_to_write(resources, directory)
    return files if swap is None else files | {"memory.swap.max": swap}


def _v1_files(resources: Resources) -> dict[str, str]:
    bandwidth = ""
    if resources.cpu_quota is not None:
        bandwidth = f"{resources.cpu_quota if resources.cpu_quota > 0 else 'max'} {resources.cpu_period or _PERIOD}"
    numbers = {
        "memory.limit_in_bytes": resources.memory_limit,
        "cpu.shares": resources.cpu_shares,
        "pids.max": None if resources.pids_limit is None else resources.pids_limit or -1,
    }
    found = {file: str(number) for file, number in numbers.items() if number is not None}
    return found | ({"cpu.max": bandwidth} if bandwidth else {})


def _bandwidth(text: str, directory: str | None) -> Properties:
    """Convert cpu.max to properties. systemd keeps whole percents, so the limit is rounded up."""
    if not text.strip():
        return {}
    quota, *rest = text.split()
    period = int(rest[0]) if rest else _PERIOD
    if not rest and directory:
        period = int(read(f"{directory}/cpu.max").split()[1])
    per_second = _INFINITY
    if quota != "max":
        per_second = -(-int(quota) * _SECOND // period // _PERCENT) * _PERCENT
    return {"CPUQuotaPeriodUSec": ("t", period), "CPUQuotaPerSecUSec": ("t", per_second)}


def _bits(text: str) -> bytes:
    """Convert a list such as "0-2,7" to a bit mask, whose first byte has 0 to 7."""
    mask = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            mask |= 1 << number
    return mask.to_bytes(mask.bit_length() // 8 + 1, "little")


def annotated(annotations: Mapping[str, str]) -> Properties:
    """Return the properties in annotations `org.systemd.property.NAME`, with GVariant values. Raises SpecError."""
    found: Properties = {}
    for key, text in annotations.items():
        if not key.startswith(ANNOTATION):
            continue
        from runtime.cgroups import gvariant

        name = key.removeprefix(ANNOTATION)
        try:
            if not (name.isascii() and name.isalpha()):
                raise ValueError(f"{name!r} is not a property name")
            kind, value = gvariant.parse(text)
            if name.endswith("Sec") and name[-4:-3].islower():
                # On D-Bus these properties are in microseconds, in unit files in seconds.
                if not isinstance(value, int | float) or value < 0 or kind == "b":
                    raise ValueError("must be a number of seconds")
                name, kind, value = f"{name[:-3]}USec", "t", int(value * _SECOND)
        except ValueError as error:
            raise SpecError(f"config.json: annotations.{key}: {error}") from None
        found[name] = (kind, value)
    return found


def hold_place() -> int:
    """Fork a child that keeps a scope alive until it has another process, and return its pid."""
    pid = os.fork()
    if pid == 0:
        os.closerange(0, 1 << 16)  # it must not hold the container's lock if we are killed
        for number in range(1, signals.NSIG):
            if signals.getsignal(number) not in (signals.SIG_DFL, None):
                signals.signal(number, signals.SIG_DFL)
        signals.alarm(SCOPE_PLACE_TIMEOUT)  # even if we are killed
        while True:
            signals.pause()
    return pid


def end_place(pid: int) -> None:
    """Kill and reap the child of `hold_place`; 0 is none."""
    if pid:
        os.kill(pid, signals.SIGKILL)
        os.waitpid(pid, 0)
