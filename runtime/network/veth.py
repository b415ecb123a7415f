"""The veth pair of a container's network: its end inside with addresses and routes, and the host's end on a bridge.

The host's end is named after the container's id and the time of its creation, so that it is found again, and is no
other's; its alias is the id. A pair is built with the host's end on no bridge: it goes on it with `attach`.
"""

from __future__ import annotations

import errno

from runtime.errors import Conflict, ContainerError, SpecError
from runtime.linux.namespaces import inside_netns
from runtime.network.netlink import Netlink

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from runtime.spec.network import Network
    from runtime.state.record import State


def host_name(state: State) -> str:
    """The name of the host's end: 15 bytes at most (IFNAMSIZ)."""
    from hashlib import sha256

    return "pm" + sha256(state.owner).hexdigest()[:13]


def build(state: State, network: Network, netns: int) -> None:
    """Make the pair, its other end in the namespace of a descriptor. Raises ContainerError, and leaves nothing."""
    name = host_name(state)
    with Netlink() as host:
        _bridge(host, network)
        taken = own_address(host, network)
        if taken:
            raise Conflict(f"{network.where}: {taken}", remedy="give the container one that nobody has")
        try:
            host.add_veth(name, network.name, netns, mac=network.mac, mtu=network.mtu)
        except OSError as error:
            words = {errno.EEXIST: "there is an interface of this name already"}.get(error.errno or 0, error.strerror)
            raise Conflict(f"{network.where}: the interfaces {name} and {network.name}: {words}") from None
        try:
            # On no bridge it is the host's own interface, which must not answer for the host's addresses.
            _sysctl(f"ipv6/conf/{name}/disable_ipv6", "1")
            _sysctl(f"ipv4/conf/{name}/arp_ignore", "8")
            index = _index(host, name)
            host.set_link(index, up=True, alias=state.id)
            inside_netns(netns, lambda: _set_up_inside(network))
        except BaseException as error:
            _delete(host, name)
            if isinstance(error, OSError):
                raise ContainerError(f"{network.where}: {name}: {error.strerror}") from None
            raise


def _bridge(host: Netlink, network: Network) -> int:
    """The index of the bridge. Raises SpecError."""
    problem = bridge_problem(host, network)
    if problem:
        raise SpecError(
            f"{network.where}: bridge={network.bridge}: {problem}",
            remedy="`ip link show type bridge` lists this host's bridges; `ip link add NAME type bridge` makes one",
        )
    return _index(host, network.bridge)


def bridge_problem(host: Netlink, network: Network) -> str:
    """Why a network's bridge cannot be used here, "" if it can."""
    found = host.link(network.bridge)
    if found is None:
        return "there is no such interface on this host"
    return "" if found["kind"] == "bridge" else "is no bridge"


def host_problems(network: Network) -> tuple[str, str]:
    """Why a network's bridge cannot be used here, and which of its addresses is this host's own; in words, or ""."""
    with Netlink() as host:
        return bridge_problem(host, network), own_address(host, network)


def own_address(host: Netlink, network: Network) -> str:
    """Which of a network's addresses is this host's own, "" if none: with it on the bridge the host loses its peers."""
    own = host.addresses()
    taken = [address.text for address in network.addresses if address.text in own]
    return f"{taken[0]} is an address of the host itself" if taken else ""


def _index(netlink: Netlink, name: str) -> int:
    found = netlink.link(name)
    if found is None:
        raise ContainerError(f"the interface {name} is gone")
    return int(found["index"])


def _set_up_inside(network: Network) -> None:
    """In the container's namespace. Raises ContainerError naming what cannot be had."""
    _sysctl(f"ipv6/conf/{network.name}/accept_dad", "0")  # nobody waits for the address of the link either
    what = f"name={network.name}"
    with Netlink() as netlink:
        try:
            index = _index(netlink, network.name)
            for address in network.addresses:
                what = f"ip={address.text}/{address.length}"
                netlink.add_address(index, address.family, address.text, address.length, _broadcast(address))
            what = f"name={network.name}"
            netlink.set_link(index, up=True)
            for gateway in network.gateways:
                what = f"gw={gateway.text}"
                netlink.add_default_route(index, gateway.family, gateway.text)
        except OSError as error:
            raise ContainerError(f"{network.where}: {what}: {error.strerror}") from None


def _broadcast(address: Any) -> str:
    """The IPv4 address that reaches all of a network, "" where there is none."""
    if address.family == 6 or address.length > 30:
        return ""
    number = int.from_bytes(address.packed, "big") | (1 << 32 - address.length) - 1
    return ".".join(map(str, number.to_bytes(4, "big")))


def attach(state: State, network: Network) -> None:
    """Put the host's end on the bridge: from here on packets come and go. Raises ContainerError."""
    with Netlink() as host:
        try:
            name = host_name(state)
            host.set_link(_index(host, name), up=True, master=_bridge(host, network))
            host.await_carrier(name)  # until then the bridge does not forward
        except OSError as error:
            raise ContainerError(
                f"{network.where}: bridge={network.bridge}: cannot be joined: {error.strerror}"
            ) from None


def take_down(state: State) -> None:
    """Set the host's end down: what the container sends then reaches nobody. Harmless when there is none."""
    with Netlink() as host:
        found = host.link(host_name(state))
        if found is not None:
            host.set_link(found["index"], up=False)


def remove(state: State) -> None:
    """Remove the pair. Harmless when there is none."""
    with Netlink() as host:
        _delete(host, host_name(state))


def _delete(host: Netlink, name: str) -> None:
    found = host.link(name)
    if found is None:
        return
    try:
        host.delete_link(found["index"])
    except OSError as error:
        if error.errno != errno.ENODEV:  # it has gone meanwhile, with its namespace
            raise ContainerError(f"the interface {name}: cannot be removed: {error.strerror}") from None


def _sysctl(path: str, value: str) -> None:
    """Set what a kernel without IPv6 has not."""
    try:
        with open(f"/proc/sys/net/{path}", "w") as file:
            file.write(value)
    except OSError:
        pass  # then there is nothing to set, or the default is lived with
