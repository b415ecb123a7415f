"""Which addresses of bridges the containers of this host have claimed."""

from __future__ import annotations

from runtime.errors import Conflict, ContainerError
from runtime.spec.network import Network, of_annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.state.store import Store


def require_free(store: Store, network: Network, container_id: str) -> None:
    """Raise Conflict when another container of this host that lives has one of the addresses."""
    problem = conflict(store, network, container_id)
    if problem is not None:
        raise Conflict(f"{network.where}: {problem}", remedy="end that one, or ask for other addresses with --net")


def conflict(store: Store, network: Network, container_id: str) -> str | None:
    """Which address of a network another living container of this store has, in words."""
    for other_id in store.ids():
        if other_id == container_id:
            continue
        try:
            state = store.look(other_id)
            other = of_annotations(state.annotations)
        except ContainerError:
            continue  # what is broken has no network, or cannot tell
        status = store.status(state)
        if other is None or status == "stopped":
            continue
        taken = {address.packed: address.text for address in other.addresses}
        for address in network.addresses:
            if address.packed in taken:
                return f"{address.text} is the address of container {other_id}, which is {status}"
        if network.mac is not None and network.mac == other.mac:
            return f"{network.mac} is the hardware address of container {other_id}, which is {status}"
    return None
