"""`run` in the foreground: the container has this process's standard streams, is its child, and is deleted at exit."""

from __future__ import annotations

import os

from runtime import sync
from runtime.lifecycle import create, delete, engine_sockets
from runtime.lifecycle.start import start
from runtime.light import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from runtime.state.store import Store

_FORWARDED = (
    signals.SIGINT, signals.SIGTERM, signals.SIGHUP, signals.SIGQUIT, signals.SIGUSR1, signals.SIGUSR2,
    signals.SIGCONT,
)  # fmt: skip


def run(store: Store, container_id: str, bundle: str, options: create.Options, *, keep: bool = False) -> int:
    """Create and start a container, wait until it exits, delete it unless `keep`; return its exit status."""
    consoles: list[socket.socket] = []

    def connect() -> socket.socket:
        ours, theirs = sync.pair()
        consoles.append(ours)
        return theirs

    state = create.create(store, container_id, bundle, options.replace(foreground=True), connect)
    try:
        with Forwarding(state.pid):
            if not consoles:
                start(store, container_id)
                return wait(state.pid)
            return with_terminal(consoles[0], lambda: start(store, container_id), lambda: wait(state.pid))
    finally:
        if not keep:
            hold_signals()
            delete.delete(store, container_id, force=True, created=state.created)


def with_terminal(ours: socket.socket, begin: Callable[[], object], end: Callable[[], int]) -> int:
    """Receive the master of a terminal and show it."""
    return show(engine_sockets.receive_master(ours), begin, end)


def show(master: int, begin: Callable[[], object], end: Callable[[], int]) -> int:
    """Copy between the master of a terminal and the standard streams, from `begin` until its other end is gone."""
    from runtime.monitor import terminal

    try:
        with terminal.Raw(0):
            terminal.copy_size(0, master)
            begin()
            terminal.pump(master)
    finally:
        os.close(master)
    return end()


def wait(pid: int) -> int:
    """Return a child's exit status, 128 + n for signal n. Other children that exit meanwhile are reaped."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


class Forwarding:
    """In a `with`: forward this process's signals to another one."""

    def __init__(self, pid: int) -> None:
        self._pid, self._pidfd = pid, -1

    def _forward(self, number: int, _frame: object) -> None:
        try:
            if self._pidfd >= 0:
                signals.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            pass  # it has just exited, and this process soon does

    def __enter__(self) -> None:
        try:
            self._pidfd = os.pidfd_open(self._pid)
        except ProcessLookupError:
            pass  # already
        self._before = {number: signals.signal(number, self._forward) for number in _FORWARDED}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signals.signal(number, handler)
        if self._pidfd >= 0:
            os.close(self._pidfd)


def hold_signals() -> None:
    """Ignore the signals that would end this process, because only the clean-up is left."""
    for number in (signals.SIGINT, signals.SIGTERM, signals.SIGHUP):
        signals.signal(number, signals.SIG_IGN)
