"""The stream of a container's memory to the target: bodies of frames (memory/layout.py), sent by a thread of its own.

The thread that reads memory only waits when the connection is DEPTH bodies behind.
"""

import queue
import threading
import zlib
from collections.abc import Callable

from criu_rpc.errors import Error
from migrate.errors import DeadlineExceeded
from migrate.limits import PAGES_CLOSE_TIMEOUT
from migrate.wire import protocol

DEPTH = 8


class MemoryStream:
    """Sends bodies by `send`, counting and hashing them. A context manager: leaving it ends the thread."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._queue: queue.Queue[bytes | None] = queue.Queue(DEPTH)
        self._failure: Exception | None = None
        self._digest = 0
        self.size = 0
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def put(self, body: bytes) -> None:
        """Send a body, as soon as it is its turn. Raises the error that has stopped the stream."""
        self._queue.put(body)
        if self._failure is not None:
            raise self._failure

    def flush(self, timeout: float) -> None:
        """Wait until all bodies are sent. Raises DeadlineExceeded, or the error that has stopped the stream."""
        with self._queue.all_tasks_done:
            if not self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, timeout):
                raise DeadlineExceeded("the memory was not sent in time")
        if self._failure is not None:
            raise self._failure

    def end(self) -> protocol.MemoryEnd:
        """Return size and digest of what was sent; call `flush` before."""
        return protocol.MemoryEnd(self.size, self._digest)

    def close(self) -> None:
        """End the thread in any state."""
        if self._thread.is_alive():
            self._failure = self._failure or DeadlineExceeded("the memory is not wanted")
            self._queue.put(None)
            self._thread.join(PAGES_CLOSE_TIMEOUT)

    def _run(self) -> None:
        while (body := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    self._digest = zlib.crc32(body, self._digest)
                    self.size += len(body)
                    self._send(body)
            except (Error, OSError) as error:
                self._failure = error
            finally:
                self._queue.task_done()
