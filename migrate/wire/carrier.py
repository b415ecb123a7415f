"""The chain that memory takes over the wire, on a thread of its own: digest, compression, bandwidth limit, encryption.

The thread that reads memory, or CRIU's page stream, only fills a queue. It waits when it is `depth` bodies ahead.
"""

import queue
import threading
import time
from collections.abc import Callable

from migrate.errors import DeadlineExceeded
from migrate.limits import CARRIER_CLOSE_TIMEOUT
from migrate.model import Compression
from migrate.wire import digests
from migrate.wire.codec import Packer
from migrate.wire.native import Buffer
from migrate.wire.rate import Limit

DEPTH = 8


class Carrier:
    """Sends bodies by `send`, which takes the parts of a payload. A context manager: leaving it ends the thread.

    `size` counts the bytes of bodies, `sent` those of payloads, and `held` the seconds spent on the bandwidth limit.
    """

    def __init__(
        self,
        send: Callable[[tuple[Buffer, ...]], None],
        *,
        digest: str = digests.CRC32,
        compress: Compression = Compression.NONE,
        limit: Limit | None = None,
        depth: int = DEPTH,
    ) -> None:
        """`digest` is a name of digests.py; several carriers may have one `limit`.

        Raises MigrateError if compression is asked for and the library is missing.
        """
        self._send, self._packer = send, Packer(compress)
        self._digest = digests.new(digest)
        self._limit = limit
        self._queue: queue.Queue[Buffer | None] = queue.Queue(depth)
        self._failure: Exception | None = None
        self.size = self.sent = 0
        self.held = 0.0
        self._thread = threading.Thread(target=self._run, name="carrier", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return how many bodies wait to be sent."""
        return self._queue.qsize()

    @property
    def compresses(self) -> bool:
        """Return whether bodies are compressed now."""
        return self._packer.compresses

    def put(self, body: Buffer) -> None:
        """Send a body, as soon as it is its turn; it must not change after that. Raises what has stopped the stream."""
        self._queue.put(body)
        if self._failure is not None:
            raise self._failure

    def lift_limit(self) -> None:
        """Send at full speed from now on: the container is frozen."""
        if self._limit is not None:
            self._limit.lift()

    def flush(self, timeout: float) -> None:
        """Wait until all bodies are sent. Raises DeadlineExceeded, or the error that has stopped the stream."""
        with self._queue.all_tasks_done:
            if not self._queue.all_tasks_done.wait_for(lambda: not self._queue.unfinished_tasks, timeout):
                raise DeadlineExceeded("the memory was not sent in time")
        if self._failure is not None:
            raise self._failure

    def digest(self) -> str:
        """Return the digest of all bodies; call `flush` before."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread in any state."""
        if self._thread.is_alive():
            self._failure = self._failure or DeadlineExceeded("the memory is not wanted")
            self.lift_limit()
            self._queue.put(None)
            self._thread.join(CARRIER_CLOSE_TIMEOUT)

    def _run(self) -> None:
        while (body := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    self._one(body)
            except Exception as error:  # whatever it is: `put` and `flush` raise it
                self._failure = error
            finally:
                self._queue.task_done()

    def _one(self, body: Buffer) -> None:
        self._digest.update(body)
        self.size += len(body)
        payload = self._packer.pack(body)
        size = sum(map(len, payload))
        begun = time.monotonic()
        if self._limit is not None:
            self.held += self._limit.take(size)
        self._send(payload)
        self.sent += size
        self._packer.sent(size, time.monotonic() - begun)


class Carriers:
    """The carriers of one container's memory, one for each connection. It can be used as one of them.

    Bodies of different connections may overtake each other; `flush`, and the target's word that it has taken all, are
    the order between rounds.
    """

    def __init__(self, first: Carrier) -> None:
        self._all = [first]

    def add(self, carrier: Carrier) -> None:
        self._all.append(carrier)

    @property
    def size(self) -> int:
        return sum(one.size for one in self._all)

    @property
    def sent(self) -> int:
        return sum(one.sent for one in self._all)

    @property
    def held(self) -> float:
        return sum(one.held for one in self._all) / len(self._all)

    @property
    def compresses(self) -> bool:
        return self._all[0].compresses

    def put(self, body: Buffer) -> None:
        """Send a body over the connection that has the fewest to send."""
        min(self._all, key=lambda one: one.waiting).put(body)

    def lift_limit(self) -> None:
        for one in self._all:
            one.lift_limit()

    def flush(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for one in self._all:
            one.flush(max(0.0, deadline - time.monotonic()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of bodies of each connection."""
        return tuple(one.size for one in self._all)

    def digests(self) -> list[tuple[int, str]]:
        """Return size and digest of each connection; call `flush` before."""
        return [(one.size, one.digest()) for one in self._all]

    def close(self) -> None:
        for one in self._all:
            one.close()
