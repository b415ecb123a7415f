"""A connection that is made while this process still imports the rest of its code and checks the container."""

import contextlib
import queue
import threading
from pathlib import Path
from typing import Self

from migrate.wire.peer import Peer, connect


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
        threading.Thread(target=self._connect, name=f"connect-{host}", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._wanted = False
        with contextlib.suppress(queue.Empty):
            made = self._made.get_nowait()
            if isinstance(made, Peer):
                made.close()

    def peer(self, _root: str | Path) -> Peer:
        """Return the connection, which is the caller's from here on. Raises what `connect` does."""
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def _connect(self) -> None:
        made: Peer | BaseException
        try:
            made = connect(self._host, root=self._root)
        except BaseException as error:
            made = error
        with self._lock:
            if self._wanted:
                self._made.put(made)
            elif isinstance(made, Peer):
                made.close()
