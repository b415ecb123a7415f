"""Gather the facts of a host on which a move depends, the same way at both ends.

This imports only the standard library, runtime and criu_rpc, because the agent runs it where nothing is installed.
"""

import base64
import contextlib
import os
import platform
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from criu_rpc.client import Criu
from criu_rpc.errors import CriuError, DeadlineExceeded
from migrate.disk import free_bytes
from migrate.errors import ProtocolError
from migrate.limits import FACTS_TIMEOUT
from migrate.memory import meminfo
from migrate.paths import DATA
from migrate.preflight import limits
from migrate.preflight.criu_checked import checked_version
from migrate.wire import codec, protocol
from migrate.wire.questions import FactsQuery, HostFacts
from runtime.errors import ContainerError
from runtime.linux.capabilities import NUMBERS, names, permitted
from runtime.state.record import check_id
from runtime.state.store import Store

if TYPE_CHECKING:
    from migrate.wire.peer import Peer


def ask(peer: "Peer", query: FactsQuery) -> HostFacts:
    """Return the facts of the host at the other end. Raises MigrateError."""
    facts = peer.call(protocol.Facts(query), FACTS_TIMEOUT)
    peer.offers = facts.offers
    return facts


def gather(query: FactsQuery) -> HostFacts:
    """Return the facts of this host, which say what is wrong here. Raises InvalidId."""
    if query.id:
        check_id(query.id)
    version, problem, cpu_problem, cpuinfo = "", "", "", ""
    try:
        criu = Criu()
        with _directory() as (path, fd):
            version = checked_version(criu, fd)
            cpu_problem, cpuinfo = _cpu(criu, query.cpuinfo, path, fd)
    except (CriuError, DeadlineExceeded) as error:
        problem = str(error)
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
        id_in_use=bool(query.id) and _is_in_use(query),
        missing=tuple(path for path in query.paths if not os.path.exists(path)),
        images_free=free_bytes(DATA),
        memory_free=meminfo.available(),
        bridge_problem=bridge_problem,
        address_problem=address_problem,
        rsync=shutil.which("rsync") is not None,
        overlay=overlay_defaults(),
        any_uid=can_carry_any_uid(),
        limits=limits.own(),
        capabilities=tuple(names(permitted())),
        offers=codec.offers(),
    )


def _is_in_use(query: FactsQuery) -> bool:
    """Return True if the id is in use, unless by what an earlier move of this very container has left.

    A move that was aborted without the knowledge of this host leaves it a container that was never resumed. The next
    move of the container has this host discard it.
    """
    store = Store(Path(query.root))
    if query.id not in store.ids():
        return False
    try:
        state = store.look(query.id)
    except ContainerError:
        return True
    return state.move is None or state.started or state.created != query.created


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
        if theirs and theirs != ours:
            image.write_bytes(base64.b64decode(theirs, validate=True))
            criu.cpuinfo_check(fd)
    except (CriuError, DeadlineExceeded) as error:
        return str(error), ""
    except ValueError:
        raise ProtocolError("FactsQuery: cpuinfo is not base64") from None
    return "", ours
