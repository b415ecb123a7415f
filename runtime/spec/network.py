"""Parse a container's network, given as `--net TEXT` or in the annotation io.pymigrate.net of its config.json.

    bridge=BRIDGE,ip=ADDRESS/LENGTH[,ip=...][,gw=ADDRESS][,mac=MAC][,name=NAME][,mtu=BYTES]
                                        a veth pair to a bridge of the host
    host                                the host's own network
    none                                loopback only
    ns:PATH, or PATH                    the network namespace that PATH stands for

It overrides the network in linux.namespaces. The container's state keeps the network in force, as the same annotation,
so that it moves with the container; config.load applies it to the spec. network/veth.py sets the network up in the
kernel, and only containers on a bridge need it.
"""

from __future__ import annotations

from runtime.errors import SpecError
from runtime.light import sockets
from runtime.light.records import Record
from runtime.spec.annotations import NET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


_MOST = 16  # addresses
_MAX_TEXT = 1024
_FORMS = (
    "bridge=BRIDGE,ip=ADDRESS/LENGTH[,ip=...][,gw=ADDRESS][,mac=MAC][,name=eth0][,mtu=1500], host, none, or ns:PATH"
)


class Address(Record):
    """An address: `family` is 4 or 6, `text` without the prefix length, `packed` in network order."""

    family: int
    text: str
    packed: bytes
    length: int

    def holds(self, packed: bytes) -> bool:
        """Return whether an address of the same family is in this one's network."""
        shift = 8 * len(self.packed) - self.length
        return int.from_bytes(packed, "big") >> shift == int.from_bytes(self.packed, "big") >> shift


class Network(Record):
    """A network on a bridge. `gateways` have different families, each in the network of an address."""

    bridge: str
    addresses: tuple[Address, ...]
    gateways: tuple[Address, ...] = ()
    mac: str | None = None
    name: str = "eth0"
    mtu: int | None = None
    where: str = NET  # the option or annotation that gave it, for messages

    def text(self) -> str:
        """Return the text from which `parse` makes an equal network."""
        parts = [f"bridge={self.bridge}"]
        parts += [f"ip={address.text}/{address.length}" for address in self.addresses]
        parts += [f"gw={gateway.text}" for gateway in self.gateways]
        parts += [f"mac={self.mac}"] if self.mac else []
        parts += [f"name={self.name}"]
        parts += [f"mtu={self.mtu}"] if self.mtu else []
        return ",".join(parts)


def of_annotations(annotations: dict[str, str]) -> Network | None:
    """Return the bridged network in a container's annotations, None if there is none. Raises SpecError."""
    text = annotations.get(NET, "")
    return None if text in ("", "host", "none") or text.startswith(("ns:", "/")) else parse(text, NET)


def parse(text: str, where: str) -> Network:
    """Parse a bridged network. Raises SpecError naming `where` and what is wrong."""

    def refuse(problem: str) -> NoReturn:
        shown = "".join(c if c.isprintable() else "?" for c in problem[:160])
        raise SpecError(f"{where}: {shown}", remedy=f"allowed: {_FORMS}")

    if len(text) > _MAX_TEXT:
        refuse("is too long")
    fields: dict[str, Any] = {"where": where}
    addresses: list[Address] = []
    gateways: list[Address] = []
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key not in ("bridge", "ip", "gw", "mac", "name", "mtu"):
            refuse(f"{part!r} is not one of bridge=, ip=, gw=, mac=, name=, mtu=, host, none or a path")
        if key == "ip":
            address = _address(value, prefix=True)
            if address is None:
                refuse(f"ip={value}: is not an interface's address with its prefix length, such as 10.88.0.5/24")
            addresses.append(address)
        elif key == "gw":
            gateway = _address(value, prefix=False)
            if gateway is None:
                refuse(f"gw={value}: is not an address")
            gateways.append(gateway)
        elif key in fields:
            refuse(f"{key}= is given twice")
        else:
            fields[key] = convert(key, value)
            if fields[key] is None:
                refuse(f"{key}={value}: {_WANTED[key]}")
    if "bridge" not in fields:
        refuse("bridge= is missing")
    if not addresses:
        refuse("ip= is missing")
    if len(addresses) > _MOST or len({address.packed for address in addresses}) < len(addresses):
        refuse(f"has an address twice, or more than {_MOST}")
    for gateway in gateways:
        _check_gateway(gateway, addresses, refuse)
    if len({gateway.family for gateway in gateways}) < len(gateways):
        refuse("has two gateways of one family")
    if fields.get("mtu", 1280) < 1280 and any(address.family == 6 for address in addresses):
        refuse(f"mtu={fields['mtu']}: IPv6 needs at least 1280 bytes")
    return Network(addresses=tuple(addresses), gateways=tuple(gateways), **fields)


def _check_gateway(gateway: Address, addresses: list[Address], refuse: Any) -> None:
    same = [address for address in addresses if address.family == gateway.family]
    if not same:
        refuse(f"gw={gateway.text}: is IPv{gateway.family}, but no ip= is")
    if gateway.packed[:2] == b"\xfe\x80" and gateway.family == 6:
        return  # link-local: reachable without an address in its network
    if not any(address.holds(gateway.packed) for address in same):
        refuse(f"gw={gateway.text}: is not in the network of any ip=")


_WANTED = {
    "bridge": "is not a valid interface name",
    "name": "is not a valid interface name",
    "mac": "must be a unicast address, such as 02:00:00:00:00:05",
    "mtu": "must be a number from 68 to 65535",
}


def convert(key: str, value: str) -> str | int | None:
    """Return the value of the field bridge, mac, name or mtu; None if it is invalid."""
    if key == "mtu":
        return int(value) if value.isascii() and value.isdigit() and 68 <= int(value) <= 65535 else None
    if key == "mac":
        value = value.lower()
        pairs = value.split(":")
        fine = len(pairs) == 6 and all(len(p) == 2 and set(p) <= set("0123456789abcdef") for p in pairs)
        return value if fine and not int(pairs[0], 16) & 1 and set(value) != set("0:") else None
    # dev_valid_name in the kernel; a comma would end the field.
    fine = 0 < len(value) <= 15 and value.isascii() and value.isprintable() and not set(value) & set("/: ,%")
    return value if fine and value not in (".", "..", "lo", "all", "default") else None


def _address(text: str, *, prefix: bool) -> Address | None:
    """Parse an address that an interface can have; return None if it is invalid."""
    text, slash, length = text.partition("/")
    if bool(slash) != prefix:
        return None
    family, number, most = (6, sockets.AF_INET6, 128) if ":" in text else (4, sockets.AF_INET, 32)
    try:
        packed = sockets.inet_pton(number, text)
    except (OSError, ValueError):
        return None
    if prefix and not (length.isascii() and length.isdigit() and len(length) < 4 and 1 <= int(length) <= most):
        return None
    multicast = packed[0] >= 224 if family == 4 else packed[0] == 0xFF
    if multicast or not any(packed) or (family == 4 and packed[0] == 127) or (family == 6 and not any(packed[:-1])):
        return None
    return Address(family, sockets.inet_ntop(number, packed), packed, int(length) if prefix else most)
