"""The veth pair of a container's network: the inner end with addresses and routes, and the host's end on a bridge.

The name of the host's end comes from the container's id and creation time, so that it can be found and is unique; its
alias is the id. A pair is built without a bridge; `attach` puts the host's end on it.
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
    """Return the name of the host's end: at most 15 bytes (IFNAMSIZ)."""
    from hashlib import sha256

    return "pm" + sha256(state.owner).hexdigest()[:13]


def build(state: State, network: Network, netns: int) -> None:
    """Make the pair, with its inner end in the namespace of a descriptor. Raises ContainerError and leaves nothing."""
    name = host_name(state)
    with Netlink() as host:
        _bridge(host, network)
        taken = own_address(host, network)
        if taken:
            raise Conflict(f"{network.where}: {taken}", remedy="give the container an unused address")
        try:
            host.add_veth(name, network.name, netns, mac=network.mac, mtu=network.mtu)
        except OSError as error:
            words = {errno.EEXIST: "an interface with this name exists already"}.get(error.errno or 0, error.strerror)
            raise Conflict(f"{network.where}: the interfaces {name} and {network.name}: {words}") from None
        try:
            # Without a bridge it is an interface of the host, which must not answer for the host's addresses.
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
    """Return the index of the bridge. Raises SpecError."""
    problem = bridge_problem(host, network)
    if problem:
        raise SpecError(
            f"{network.where}: bridge={network.bridge}: {problem}",
            remedy="`ip link show type bridge` lists this host's bridges; `ip link add NAME type bridge` makes one",
        )
    return _index(host, network.bridge)


def bridge_problem(host: Netlink, network: Network) -> str:
    """Return why a network's bridge cannot be used here, "" if it can."""
    found = host.link(network.bridge)
    if found is None:
        return "this host has no such interface"
    return "" if found["kind"] == "bridge" else "is not a bridge"


def host_problems(network: Network) -> tuple[str, str]:
    """Describe why a network's bridge cannot be used here, and which of its addresses this host has; "" if none."""
    with Netlink() as host:
        return bridge_problem(host, network), own_address(host, network)


def own_address(host: Netlink, network: Network) -> str:
    """Describe which address of a network this host has, "" if none: on the bridge it would cut off the host."""
    own = host.addresses()
    taken = [address.text for address in network.addresses if address.text in own]
    return f"{taken[0]} is an address of the host itself" if taken else ""


def _index(netlink: Netlink, name: str) -> int:
    found = netlink.link(name)
    if found is None:
        raise ContainerError(f"the interface {name} is gone")
    return int(found["index"])


def _set_up_inside(network: Network) -> None:
    """Set up the inner end, in the container's namespace. Raises ContainerError naming the failed setting."""
    _sysctl(f"ipv6/conf/{network.name}/accept_dad", "0")  # nothing waits for the link-local address either
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
    """Return the IPv4 broadcast address of a network, "" without one."""
    if address.family == 6 or address.length > 30:
        return ""
    number = int.from_bytes(address.packed, "big") | (1 << 32 - address.length) - 1
    return ".".join(map(str, number.to_bytes(4, "big")))


def attach(state: State, network: Network) -> None:
    """Put the host's end on the bridge, so that packets pass. Raises ContainerError."""
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
    """Set the host's end down, so that the container's packets reach nobody. Harmless without a pair."""
    with Netlink() as host:
        found = host.link(host_name(state))
        if found is not None:
            host.set_link(found["index"], up=False)


def remove(state: State) -> None:
    """Remove the pair. Harmless without one."""
    with Netlink() as host:
        _delete(host, host_name(state))


def _delete(host: Netlink, name: str) -> None:
    found = host.link(name)
    if found is None:
        return
    try:
        host.delete_link(found["index"])
    except OSError as error:
        if error.errno != errno.ENODEV:  # it has disappeared meanwhile, with its namespace
            raise ContainerError(f"the interface {name}: cannot be removed: {error.strerror}") from None


def _sysctl(path: str, value: str) -> None:
    """Set a sysctl that a kernel without IPv6 may not have."""
    try:
        with open(f"/proc/sys/net/{path}", "w") as file:
            file.write(value)
    except OSError:
        pass  # there is nothing to set, or the default stays
