"""Gather the facts of a host on which a move depends, the same way at both ends.

This imports only the standard library, runtime and criu_rpc, because the agent runs it where nothing is installed.
"""

import base64
import contextlib
import dataclasses
import os
import platform
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError, DeadlineExceeded
from migrate.disk import free_bytes
from migrate.errors import ProtocolError
from migrate.paths import DATA
from migrate.preflight import limits
from runtime.errors import InvalidId
from runtime.linux.capabilities import NUMBERS, names, permitted
from runtime.state.record import check_id
from runtime.state.store import Store

_MAX_PATHS = 1000


def _checked(cls: type[Any], value: Any) -> dict[str, Any]:
    """Return a dataclass's fields from JSON off the wire, each of its default's type. Raises ProtocolError."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(value, dict) or set(value) != set(fields):
        raise ProtocolError(f"{cls.__name__}: the fields are not those of this version")
    for name, item in value.items():
        example = fields[name].default
        if example is dataclasses.MISSING:
            example = ()
        kind = list if isinstance(example, tuple) else type(example)
        if type(item) is not kind or (kind is list and not all(isinstance(part, str) for part in item)):
            raise ProtocolError(f"{cls.__name__}: {name}: must be of type {kind.__name__}")
    return {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}


@dataclass(frozen=True)
class FactsQuery:
    """The source's questions: is `id` in use below `root`, which of `paths` are missing, does the processor have what
    `cpuinfo` (CRIU's cpuinfo.img, base64) requires, can a container have the network `net` (spec/network.py) here. ""
    stands for a question that is not asked."""

    id: str = ""
    root: str = ""
    paths: tuple[str, ...] = ()
    cpuinfo: str = ""
    net: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "paths": list(self.paths)}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Raises ProtocolError, InvalidId."""
        query = cls(**_checked(cls, value))
        if len(query.paths) > _MAX_PATHS or not all(path.startswith("/") and "\0" not in path for path in query.paths):
            raise ProtocolError(f"FactsQuery: paths must be absolute, and at most {_MAX_PATHS}")
        if query.id:
            check_id(query.id)
        return query


@dataclass(frozen=True)
class HostFacts:
    """One host. Empty strings stand for "no problem" or "unknown"; sizes in bytes."""

    name: str = ""
    machine: str = ""
    bits: int = 0
    kernel: str = ""
    python: str = ""
    criu: str = ""  # version, "" if it is not installed
    criu_problem: str = ""  # why CRIU does not work here
    cpu_problem: str = ""  # what the processor lacks
    cpuinfo: str = ""  # this host's own cpuinfo.img, base64
    id_in_use: bool = False
    missing: tuple[str, ...] = ()
    images_free: int = 0
    rsync: bool = False
    bridge_problem: str = ""  # why the network in the query cannot be set up here
    address_problem: str = ""  # which of its addresses is in use here
    overlay: tuple[str, ...] = ()  # default options of overlay mounts, as "name=value"
    any_uid: bool = False  # CAP_SYS_RESOURCE, without which CRIU cannot dump processes of other users
    limits: tuple[str, ...] = ()  # the highest hard limits that can be restored here without it (limits.own)
    capabilities: tuple[str, ...] = ()  # root's capabilities here

    def to_json(self) -> dict[str, Any]:
        lists = {name: list(getattr(self, name)) for name in ("missing", "overlay", "limits", "capabilities")}
        return {**dataclasses.asdict(self), **lists}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Raises ProtocolError."""
        return cls(**_checked(cls, value))


def gather(query: FactsQuery) -> HostFacts:
    """Return the facts of this host. What is wrong here is in the facts; it is never raised."""
    version, problem, cpu_problem, cpuinfo = "", "", "", ""
    try:
        criu = Criu()
        version = str(criu.version())
        with _directory() as (path, fd):
            cpu_problem, cpuinfo = _cpu(criu, query.cpuinfo, path, fd)
            criu.check(fd)
    except (CriuError, DeadlineExceeded) as error:
        problem = str(error)
    try:
        in_use = bool(query.id) and query.id in Store(Path(query.root)).ids()
    except InvalidId:
        in_use = False
    bridge_problem, address_problem = _network(query)
    return HostFacts(
        name=os.uname().nodename,
        machine=platform.machine(),
        bits=struct.calcsize("P") * 8,
        kernel=platform.release(),
        python=".".join(map(str, sys.version_info[:3])),
        criu=version,
        criu_problem=problem,
        cpu_problem=cpu_problem,
        cpuinfo=cpuinfo,
        id_in_use=in_use,
        missing=tuple(path for path in query.paths if not os.path.exists(path)),
        images_free=free_bytes(DATA),
        bridge_problem=bridge_problem,
        address_problem=address_problem,
        rsync=shutil.which("rsync") is not None,
        overlay=overlay_defaults(),
        any_uid=can_carry_any_uid(),
        limits=limits.own(),
        capabilities=tuple(names(permitted())),
    )


def _network(query: FactsQuery) -> tuple[str, str]:
    """Return what is wrong here with the queried network's bridge, and with its addresses; "" for nothing."""
    if not query.net:
        return "", ""
    from runtime.network import claims, veth
    from runtime.spec import network

    wanted = network.parse(query.net, "--net")
    try:
        bridge, address = veth.host_problems(wanted)
        return bridge and f"bridge={wanted.bridge}: {bridge}", address or claims.conflict(
            Store(Path(query.root)), wanted, query.id
        ) or ""
    except OSError as error:
        return f"bridge={wanted.bridge}: cannot be looked up: {error.strerror}", ""


def can_carry_any_uid() -> bool:
    """Return whether CRIU can read the limits of other users' processes here (CAP_SYS_RESOURCE)."""
    return bool(permitted() >> NUMBERS["CAP_SYS_RESOURCE"] & 1)


def overlay_defaults() -> tuple[str, ...]:
    """Return the parameters of the kernel's overlay module as "name=value"; none while it is not loaded."""
    found = []
    for name in ("index", "metacopy", "nfs_export", "redirect_always_follow", "redirect_dir", "xino_auto"):
        with contextlib.suppress(OSError):
            found.append(f"{name}={Path('/sys/module/overlay/parameters', name).read_text().strip()}")
    return tuple(found)


@contextlib.contextmanager
def _directory() -> Iterator[tuple[Path, int]]:
    """Make a temporary directory for CRIU's files; yield its path and a descriptor of it."""
    with tempfile.TemporaryDirectory(prefix="pymigrate-") as name:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield Path(name), fd
        finally:
            os.close(fd)


def _cpu(criu: Criu, theirs: str, directory: Path, fd: int) -> tuple[str, str]:
    """Return what this processor lacks of `theirs` ("" for nothing, or if that is ""), and its own cpuinfo.img."""
    image = directory / "cpuinfo.img"
    try:
        criu.cpuinfo_dump(fd)
        ours = base64.b64encode(image.read_bytes()).decode()
        if theirs:
            image.write_bytes(base64.b64decode(theirs, validate=True))
            criu.cpuinfo_check(fd)
    except (CriuError, DeadlineExceeded) as error:
        return str(error), ""
    except ValueError:
        raise ProtocolError("FactsQuery: cpuinfo is not base64") from None
    return "", ours
