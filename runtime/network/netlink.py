"""Links, addresses and routes by rtnetlink(7): pyroute2's messages over a plain blocking socket.

All of pyroute2 brings an event loop and takes 75 ms to import; its messages take 20 ms. So the package is imported
without its `__init__`, which imports the rest. The agent has only these modules of it.
"""

from __future__ import annotations

import importlib.util
import socket
import sys
import time

from runtime.limits import CARRIER_TIMEOUT, NETLINK_TIMEOUT
from runtime.network import nlmsg
from runtime.network.nlmsg import ACK, CREATE, DUMP, EXCL, REQUEST

if "pyroute2" not in sys.modules:
    _found = importlib.util.find_spec("pyroute2")
    if _found is None:
        raise ModuleNotFoundError("No module named 'pyroute2'", name="pyroute2")
    sys.modules["pyroute2"] = importlib.util.module_from_spec(_found)

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

IFF_UP = 1
_OPERSTATE_UP = 6
_NEWLINK, _DELLINK, _GETLINK, _SETLINK = 16, 17, 18, 19
_NEWADDR, _GETADDR, _NEWROUTE, _GETNEIGH = 20, 22, 24, 30
_IFA_F_NODAD = 2
_NUD_INCOMPLETE = 1
_RTPROT_STATIC, _RT_TABLE_MAIN, _RTN_UNICAST = 4, 254, 1
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


class Netlink:
    """A socket to the network namespace in which it is made. Methods raise OSError with the kernel's errno."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(NETLINK_TIMEOUT)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def link(self, name: str) -> dict[str, Any] | None:
        """Return an interface: index, flags, operational (RFC 2863), kind, alias, mac, master; None without one."""
        message = ifinfmsg()
        message["attrs"] = [["IFLA_IFNAME", name]]
        try:
            found = self._request(_GETLINK, message, 0)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno == 19:  # ENODEV
                return None
            raise
        return _describe(found[0]) if found else None

    def await_carrier(self, name: str) -> None:
        """Wait, for CARRIER_TIMEOUT at most, until an interface whose two ends are up forwards packets.

        The kernel activates the end that was up first from a work queue, and silently drops all packets until then.
        """
        deadline = time.monotonic() + CARRIER_TIMEOUT
        while time.monotonic() < deadline:
            found = self.link(name)
            if found is None or not found["flags"] & IFF_UP or found["operational"]:
                return
            time.sleep(0.001)

    def add_veth(self, name: str, peer: str, netns: int, **both: Any) -> None:
        """Make a pair: `name` here, `peer` in the namespace of a descriptor. `mac` is the peer's, `mtu` is for both."""
        mtu = [["IFLA_MTU", both["mtu"]]] if both.get("mtu") else []
        inner = [["IFLA_IFNAME", peer], ["IFLA_ADDRESS", both["mac"]], ["IFLA_NET_NS_FD", netns], *mtu]
        data = {"attrs": [["VETH_INFO_PEER", {"attrs": inner}]]}
        message = ifinfmsg()
        message["attrs"] = [
            ["IFLA_IFNAME", name], *mtu,
            ["IFLA_LINKINFO", {"attrs": [["IFLA_INFO_KIND", "veth"], ["IFLA_INFO_DATA", data]]}],
        ]  # fmt: skip
        self._request(_NEWLINK, message, CREATE | EXCL)

    def set_link(self, index: int, *, up: bool | None = None, master: int | None = None, alias: str = "") -> None:
        """Change an interface; `master` is the index of a bridge, 0 for none."""
        message = ifinfmsg()
        message["index"] = index
        if up is not None:
            message["flags"], message["change"] = (IFF_UP if up else 0), IFF_UP
        message["attrs"] = [["IFLA_IFALIAS", alias]] if alias else []
        message["attrs"] += [] if master is None else [["IFLA_MASTER", master]]
        self._request(_SETLINK, message, 0)

    def delete_link(self, index: int) -> None:
        message = ifinfmsg()
        message["index"] = index
        self._request(_DELLINK, message, 0)

    def add_address(self, index: int, family: int, text: str, length: int, broadcast: str = "") -> None:
        """Give an interface an address without checking for duplicates, so that it can be used at once."""
        message = ifaddrmsg()
        message["family"], message["prefixlen"], message["index"] = _FAMILIES[family], length, index
        message["attrs"] = [["IFA_LOCAL", text], ["IFA_ADDRESS", text], ["IFA_FLAGS", _IFA_F_NODAD]]
        message["attrs"] += [["IFA_BROADCAST", broadcast]] if broadcast else []
        self._request(_NEWADDR, message, CREATE | EXCL)

    def addresses(self) -> set[str]:
        """Return all addresses of all interfaces, without prefix lengths."""
        texts = set()
        for found in self._request(_GETADDR, ifaddrmsg(), DUMP):
            text = found.get_attr("IFA_LOCAL") or found.get_attr("IFA_ADDRESS")
            if text:
                texts.add(str(text))
        return texts

    def unanswered(self) -> list[bytes]:
        """Return the addresses of neighbours, in network order, that have not answered a question yet."""
        found = []
        for neighbour in self._request(_GETNEIGH, ndmsg(), DUMP):
            address = neighbour.get_attr("NDA_DST")
            if neighbour["state"] == _NUD_INCOMPLETE and neighbour["family"] in _FAMILIES.values() and address:
                found.append(socket.inet_pton(neighbour["family"], address))
        return found

    def add_default_route(self, index: int, family: int, gateway: str) -> None:
        message = rtmsg()
        message["family"], message["table"], message["proto"] = _FAMILIES[family], _RT_TABLE_MAIN, _RTPROT_STATIC
        message["type"] = _RTN_UNICAST
        message["attrs"] = [["RTA_GATEWAY", gateway], ["RTA_OIF", index]]
        self._request(_NEWROUTE, message, CREATE | EXCL)

    def _request(self, kind: int, message: Any, flags: int) -> list[Any]:
        """Send a message, wait for the end of its answers, and return them decoded."""
        self._sequence += 1
        message["header"]["type"], message["header"]["flags"] = kind, REQUEST | flags | (0 if flags == DUMP else ACK)
        message["header"]["sequence_number"] = self._sequence
        message.encode()
        self._socket.send(message.data)
        found: list[Any] = []
        for body in nlmsg.answers(self._socket, self._sequence, self._sequence):
            decoded = type(message)(nlmsg.message(kind, 0, 0, body))
            decoded.decode()
            found.append(decoded)
        return found


def _describe(message: Any) -> dict[str, Any]:
    info = message.get_attr("IFLA_LINKINFO")
    return {
        "index": message["index"],
        "flags": message["flags"],
        "operational": message.get_attr("IFLA_OPERSTATE") in (None, "UP", _OPERSTATE_UP),
        "kind": info.get_attr("IFLA_INFO_KIND") if info is not None else None,
        "alias": message.get_attr("IFLA_IFALIAS"),
        "mac": message.get_attr("IFLA_ADDRESS"),
        "master": message.get_attr("IFLA_MASTER"),
    }
