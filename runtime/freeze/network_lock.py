"""Narrow CRIU's lock on the network to the container's connections, in a network namespace that others use too.

At a dump CRIU makes a table `inet CRIU-<id of the dump>` that drops every packet in the container's namespace (in the
host's own: every packet of the container's connections). Undoing the dump removes the table, and so does a restore
from the same images; a dump whose container is killed leaves it. In a namespace that the container joined, or the
host's, this module corrects that. While the container is frozen, `prepare` adds rules that drop the container's
connections, and marks the table as the container's with an empty chain; `ended` opens it to everything else. A
restore of the same container in the same namespace removes it (`back`). A killed CRIU leaves its table in any
namespace; `unlock` removes it.

The connections stay dropped, because the namespace would answer their packets with RST, while their peers must
talk to the container where it is now.
"""

from __future__ import annotations

import os

from criu_rpc import image_codec
from criu_rpc.errors import Error
from runtime.network import nftables
from runtime.network.nftables import Nftables

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from runtime.network.nftables import Chain, Message
    from runtime.spec.config import Spec
    from runtime.state.record import State

    _End = tuple[bytes, int]

_PREFIX = "CRIU-"


def prepare(state: State, spec: Spec, directory: int, *, keep: bool = True) -> None:
    """Add rules and mark to CRIU's table at `post-dump`; `directory`: descriptor of the images.

    `keep`: go on dropping the connections after the container has left. A namespace of the container's own is left
    alone, because it goes with the container. In the host's network no connection is kept: those with other hosts are
    closed, or block the move. A failure leaves the lock as it is.
    """
    if spec.is_new("network"):
        return
    name = _PREFIX + (image_codec.dump_id(directory) or str(state.pid))
    connections = image_codec.connections(directory) if keep and "network" in spec.namespaces else []

    def changes(chains: list[Chain]) -> list[Message]:
        # CRIU 4.2 cuts the name after 26 characters.
        found = {table for table, _, _ in chains if table == name or (len(table) > 25 and name.startswith(table))}
        return [message for table in found for message in _prepared(table, state.id, connections)]

    _change(f"/proc/{state.pid}/ns/net", changes)


def _prepared(table: str, container_id: str, connections: list[tuple[_End, _End]]) -> Iterator[Message]:
    yield nftables.chain(table, _mark(container_id, keep=bool(connections)))
    for number, (family, width) in enumerate(((nftables.IPV4, 4), (nftables.IPV6, 16)), 1):
        keys = [nftables.key(*ends) for ends in connections if len(ends[0][0]) == width]
        if not keys:
            continue
        name = f"moved{number}"
        yield nftables.connection_set(table, name, family, number)
        yield from nftables.elements(table, name, keys)
        for chain, incoming in (("input", True), ("output", False)):
            fits = nftables.is_connection(family, name, incoming=incoming)
            yield nftables.drop_rule(table, chain, *nftables.is_family(family), *nftables.is_tcp(), *fits)


def ended(spec: Spec, container_id: str) -> None:
    """Unlock the namespace of a container that has left, except for its connections."""

    def changes(chains: list[Chain]) -> list[Message]:
        opened = _marked(chains, container_id, keep=True)
        closed = [(table, chain) for table, chain, policy in chains if table in opened and policy == nftables.DROP]
        return [
            *(nftables.set_policy(table, chain, nftables.ACCEPT) for table, chain in closed),
            *map(nftables.delete_table, _marked(chains, container_id, keep=False)),
        ]

    if not spec.is_new("network"):
        _change(spec.namespaces.get("network") or "/proc/thread-self/ns/net", changes)


def back(spec: Spec, container_id: str) -> None:
    """Unlock the namespace completely, because the container's sockets are in it again."""

    def changes(chains: list[Chain]) -> list[Message]:
        marked = _marked(chains, container_id, keep=True) + _marked(chains, container_id, keep=False)
        return [nftables.delete_table(table) for table in marked]

    path = spec.namespaces.get("network")
    if path is not None:
        _change(path, changes)


def locks(pid: int) -> list[str]:
    """Return the names of all CRIU locks in the network namespace of a process, whichever container they belong to."""
    found: set[str] = set()

    def look(chains: list[Chain]) -> list[Message]:
        found.update(table for table, _, _ in chains if table.startswith(_PREFIX))
        return []

    _change(f"/proc/{pid}/ns/net", look)
    return sorted(found)


def unlock(pid: int, names: Collection[str]) -> None:
    """Remove those of the locks that exist. Raises OSError, ContainerError."""

    def changes(chains: list[Chain]) -> list[Message]:
        return [nftables.delete_table(name) for name in {table for table, _, _ in chains}.intersection(names)]

    if names:
        _try(f"/proc/{pid}/ns/net", changes)


def _change(path: str, changes: Callable[[list[Chain]], list[Message]]) -> None:
    try:
        _try(path, changes)
    except (OSError, Error):
        pass  # the namespace is gone, or the kernel has no nf_tables


def _try(path: str, changes: Callable[[list[Chain]], list[Message]]) -> None:
    """List the chains of a namespace and send the `changes` for them. Raises OSError, ContainerError."""
    netns = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Nftables(netns) as socket:
            messages = changes(socket.chains())
            if messages:
                socket.change(messages)
    finally:
        os.close(netns)


def _mark(container_id: str, *, keep: bool) -> str:
    from hashlib import sha256

    return ("moved-" if keep else "ended-") + sha256(container_id.encode()).hexdigest()[:16]


def _marked(chains: list[Chain], container_id: str, *, keep: bool) -> list[str]:
    mark = _mark(container_id, keep=keep)
    return [table for table, chain, _ in chains if chain == mark and table.startswith(_PREFIX)]
