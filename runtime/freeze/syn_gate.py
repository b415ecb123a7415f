"""No new connections while a container is about to be frozen.

A connection that is set up between the last look at the container's sockets and CRIU's lock on its network would be
lost, or make the dump fail. So segments that ask for a connection (SYN) are dropped before that; who sent one sends it
again after a second, when the container answers again, here or at a target. Those on the loopback pass.

The table belongs to our netlink socket: the kernel removes it when that is closed, whatever becomes of us. A kernel
older than 5.12, or without nf_tables, has no gate.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from runtime.linux import processes
from runtime.network import nftables, sockdiag
from runtime.network.nftables import Nftables
from runtime.spec.config import Spec
from runtime.state.record import State

_LISTEN = 10
_TABLE = "pymigrate-gate"


@contextlib.contextmanager
def closed(state: State, spec: Spec) -> Iterator[None]:
    """In a `with`: nobody outside the container's network gets a new TCP connection to it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            # In a network of others, by the ports that it listens at.
            doors = [nftables.is_to_port(port) for port in _ports(state.pid)]
            if spec.is_new("network") and doors:
                doors = [[]]
            netns = os.open(f"/proc/{state.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, netns)
            if doors:
                _close(stack.enter_context(Nftables(netns)), f"{_TABLE}-{state.pid}", doors)
        yield


def _close(socket: Nftables, table: str, doors: list[list[Any]]) -> None:
    changes = [nftables.table(table, nftables.TABLE_OWNER), nftables.chain(table, "input", nftables.INPUT)]
    syn = [*nftables.is_not_loopback(), *nftables.is_tcp(), *nftables.is_syn()]
    socket.change([*changes, *(nftables.drop_rule(table, "input", *syn, *door) for door in doors)])


def _ports(init_pid: int) -> list[int]:
    """The TCP ports that the container listens at."""
    held = set()
    for pid in processes.container_pids(init_pid):
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    held.add(entry.stat().st_ino)
    with sockdiag.diag(init_pid) as diag:
        return sorted({entry.local[1] for entry in diag.tcp() if entry.state == _LISTEN and entry.inode in held})
