"""Find conflicts between the addresses that containers of this host claim."""

from __future__ import annotations

from runtime.errors import Conflict, ContainerError
from runtime.spec.network import Network, of_annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.state.store import Store


def require_free(store: Store, network: Network, container_id: str) -> None:
    """Raise Conflict if another running container of this host has one of the addresses."""
    problem = conflict(store, network, container_id)
    if problem is not None:
        raise Conflict(f"{network.where}: {problem}", remedy="delete that one, or request other addresses with --net")


def conflict(store: Store, network: Network, container_id: str) -> str | None:
    """Describe which address of a network another running container of this store has; None if none."""
    for other_id in store.ids():
        if other_id == container_id:
            continue
        try:
            state = store.look(other_id)
            other = of_annotations(state.annotations)
        except ContainerError:
            continue  # a broken container has no network, or it is unknown
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
