"""Limit how many bytes go over the connection in a second."""

import threading
import time
from collections.abc import Callable

_BURST = 0.1  # seconds' worth of bytes that go at once after a rest


class Limit:
    """Makes senders wait until their bytes may go. Thread-safe."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate` is in bytes per second."""
        self._rate, self._clock = rate, clock
        self._free_at = clock()  # when everything so far has gone at this rate
        self._lock, self._lifted = threading.Lock(), threading.Event()

    def take(self, size: int) -> float:
        """Wait until `size` more bytes may go, and return the seconds that this took."""
        if self._lifted.is_set():
            return 0.0
        with self._lock:
            now = self._clock()
            begin = max(self._free_at, now - _BURST)
            self._free_at = begin + size / self._rate
        if begin <= now:
            return 0.0
        self._lifted.wait(begin - now)
        return self._clock() - now

    def lift(self) -> None:
        """From now on nobody waits, also those that wait already."""
        self._lifted.set()
