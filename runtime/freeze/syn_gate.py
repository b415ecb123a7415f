"""Block new TCP connections while a container is about to be frozen.

A connection that is set up between the last survey of the container's sockets and CRIU's lock on its network would be
lost, or make the dump fail. SYN segments are therefore dropped before the survey. The sender repeats its SYN after a
second, when the container answers again, here or at the target. SYNs on the loopback interface pass.

The table belongs to this process's netlink socket, so the kernel removes it when this process exits, however it does.
A kernel older than 5.12, or without nf_tables, blocks nothing.
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
    """Block new TCP connections to the container from outside its network during a `with`."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            # In a namespace that others use too, block only the ports at which the container listens.
            matches = [nftables.is_to_port(port) for port in _ports(state.pid)]
            if spec.is_new("network") and matches:
                matches = [[]]
            netns = os.open(f"/proc/{state.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, netns)
            if matches:
                _close(stack.enter_context(Nftables(netns)), f"{_TABLE}-{state.pid}", matches)
        yield


def _close(socket: Nftables, table: str, matches: list[list[Any]]) -> None:
    """Drop SYN segments from outside that fit one of the `matches`."""
    changes = [nftables.table(table, nftables.TABLE_OWNER), nftables.chain(table, "input", nftables.INPUT)]
    syn = [*nftables.is_not_loopback(), *nftables.is_tcp(), *nftables.is_syn()]
    socket.change([*changes, *(nftables.drop_rule(table, "input", *syn, *match) for match in matches)])


def _ports(init_pid: int) -> list[int]:
    """Return the TCP ports at which the container listens."""
    held = set()
    for pid in processes.container_pids(init_pid):
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    held.add(entry.stat().st_ino)
    with sockdiag.diag(init_pid) as diag:
        return sorted({entry.local[1] for entry in diag.tcp() if entry.state == _LISTEN and entry.inode in held})
