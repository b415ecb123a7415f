"""What a source asks a target about itself before it moves anything, as records: facts, ports, files.

`migrate/preflight` asks and answers (hostfacts.py, ports.py, open_files.py); here is only what travels.
"""

import socket
from typing import Annotated

from migrate.errors import ProtocolError
from migrate.wire.records import Most, Range
from runtime.light.records import Record

MAX_PATHS = 1000
MAX_PORTS = 5000
MAX_FILES = 5000
PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "udplite": 136}


class FactsQuery(Record):
    """What a source asks about a host; "" asks nothing.

    Is `id` in use below `root`, other than by what an earlier move of the container `created` then has left? Which of
    `paths` are missing? Does the processor have what `cpuinfo` (CRIU's cpuinfo.img, base64) says? Can a container have
    the network `net` (spec/network.py)?
    """

    id: str = ""
    created: str = ""
    root: str = ""
    paths: Annotated[tuple[str, ...], Most(MAX_PATHS)] = ()
    cpuinfo: str = ""
    net: str = ""

    def __post_init__(self) -> None:
        if not all(path.startswith("/") and "\0" not in path for path in self.paths):
            raise ProtocolError("FactsQuery: paths must be absolute")


class HostFacts(Record):
    """One host. Empty strings stand for "no problem" or "unknown"; sizes in bytes."""

    name: str = ""
    machine: str = ""
    bits: int = 0
    kernel: str = ""
    python: str = ""
    criu: str = ""  # version, "" when there is none
    criu_problem: str = ""  # why CRIU does not work here
    cpu_problem: str = ""  # what the processor lacks
    cpuinfo: str = ""  # this host's own cpuinfo.img, base64
    id_in_use: bool = False
    missing: tuple[str, ...] = ()
    images_free: int = 0
    memory_free: int = 0
    rsync: bool = False
    bridge_problem: str = ""  # why the network that was asked for cannot be had here
    address_problem: str = ""  # which of its addresses is in use here
    overlay: tuple[str, ...] = ()  # what holds for options of overlay mounts where nothing is said, as "name=value"
    any_uid: bool = False  # CAP_SYS_RESOURCE, without which CRIU cannot dump processes of other users
    limits: tuple[str, ...] = ()  # the highest hard limits of what is restored here without that (limits.own)
    capabilities: tuple[str, ...] = ()  # those that root has here
    offers: tuple[str, ...] = ()  # the digests (wire/digests.py) and compressions (wire/codec.py) that it computes


class Bound(Record):
    """A socket that is bound to a port and not connected; the options are those that decide what it may share."""

    protocol: str
    address: str
    port: Annotated[int, Range(1, 65535)]
    device: str = ""
    reuse_address: bool = False
    reuse_port: bool = False
    only_v6: bool = False
    free: bool = False

    def __post_init__(self) -> None:
        try:
            socket.inet_pton(self.family, self.address)
        except (OSError, ValueError):
            raise ProtocolError(f"{self.address!r} is not an address") from None
        if self.protocol not in PROTOCOLS or len(self.device.encode(errors="replace")) > 15:
            raise ProtocolError("Bound: protocol or device is malformed")

    def __str__(self) -> str:
        return f"{self.protocol} {endpoint((self.address, self.port))}"

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET


def endpoint(address: tuple[str, int]) -> str:
    """An address and a port as people write them."""
    host, port = address
    host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Seen(Record):
    """A regular file: size, mtime, ELF build-id in hex ("": it has none), SHA-256 of its contents ("": not asked for).

    `size` is -1 where there is no regular file at `path`.
    """

    path: str
    size: int = -1
    mtime_ns: int = 0
    build_id: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or "\0" in self.path:
            raise ProtocolError(f"{self.path!r} is not an absolute path")
