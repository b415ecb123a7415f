"""A connection that is made while this process still imports the rest of its code and checks the container.

The log-in goes to and fro ten times, between two threads of this process and the host. A thread that imports would keep
each of them waiting for Python's lock for 5 ms, the interpreter's switch interval, which is therefore short meanwhile.
"""

import contextlib
import queue
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from migrate.wire.bootstrap import reach

if TYPE_CHECKING:
    from migrate.wire.peer import Peer

SWITCH_INTERVAL = 0.0002  # seconds


class Ahead:
    """Connect to `host` on a thread of its own, for one move.

    A context manager: leaving it ends a connection that nobody has taken, and does not wait for one that is not made
    yet. That ends as soon as it is made, or with this process.
    """

    def __init__(self, host: str, root: str | Path) -> None:
        self._host, self._root = host, str(root)
        self._made: queue.SimpleQueue[Peer | BaseException] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._wanted = True
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        threading.Thread(target=self._connect, name=f"connect-{host}", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._wanted = False
        with contextlib.suppress(queue.Empty):
            _close(self._made.get_nowait())

    def peer(self, _root: str | Path) -> "Peer":
        """Return the connection, which is the caller's from here on. Raises what `connect` does."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def _connect(self) -> None:
        made: Peer | BaseException
        try:
            reached = reach(self._host)
            from migrate.wire.peer import greet  # 40 ms, in which the agent starts

            made = greet(self._host, *reached, self._root)
        except BaseException as error:
            made = error
        sys.setswitchinterval(self._interval)
        with self._lock:
            if self._wanted:
                self._made.put(made)
            else:
                _close(made)


def _close(made: "Peer | BaseException") -> None:
    if not isinstance(made, BaseException):
        made.close()
