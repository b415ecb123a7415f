"""The namespaces that CRIU does not make at a restore, and the network on a bridge in one of them."""

from __future__ import annotations

import os

from runtime.checkpoint import options as criu_options
from runtime.linux import namespaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.lifecycle.provision import Provision
    from runtime.linux.descriptors import Owned
    from runtime.network.announce import Announcer


class RestoredNetwork:
    """The container's network: built before the restore, connected to its bridge just before the container runs."""

    def __init__(self, made: Provision) -> None:
        self._made = made
        self._announcer: Announcer | None = None

    def open_namespaces(self, owner: Owned) -> list[tuple[str, int]]:
        """Open the namespaces that CRIU does not make: [(key in the images, descriptor of `owner`)]."""
        spec = self._made.spec
        found: list[tuple[str, int]] = []
        if criu_options.is_own_network(spec):
            netns = owner.fd(namespaces.new_netns())
            self._build(netns)
            found.append((criu_options.external_key("network"), netns))
        for kind, path in criu_options.joined(spec).items():
            found.append((criu_options.external_key(kind), owner.fd(namespaces.open_path(kind, path))))
        return found

    def fill(self, pid: int) -> None:
        """Build the network in the empty namespace that CRIU has made for its restored init `pid`."""
        netns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespaces.inside_netns(netns, lambda: namespaces.bring_up("lo"))
            self._build(netns)
        finally:
            os.close(netns)

    def _build(self, netns: int) -> None:
        """Build everything but the connection to the bridge, in a namespace that holds only `lo`."""
        wanted = self._made.spec.network
        if wanted is not None:
            from runtime.network import announce, veth

            veth.build(self._made.state, wanted, netns)
            self._announcer = announce.Announcer(wanted, netns)

    def connect(self) -> None:
        """Connect the network to its bridge, announce it, and ask the neighbours' addresses."""
        wanted = self._made.spec.network
        if self._announcer is not None and wanted is not None:
            from runtime.network import veth

            veth.attach(self._made.state, wanted)
            self._announcer.send()
            self._announcer.ask()

    def settle(self, *, again: bool) -> None:
        """Close what announces the network; `again`: a process of its own repeats the announcement."""
        if self._announcer is not None and again:
            self._announcer.repeat()
        self.close()

    def close(self) -> None:
        if self._announcer is not None:
            self._announcer.close()
            self._announcer = None
