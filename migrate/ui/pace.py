"""How fast bytes go, from the events of their progress."""

import time
from collections.abc import Callable

from migrate.events import Progress


class Pace:
    """The rate since a phase, or a round over memory, has begun."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began, self._before = clock(), 0

    def restart(self) -> None:
        """Bytes are counted from 0 again, from now on."""
        self._began, self._before = self._clock(), 0

    def of(self, event: Progress) -> float:
        """Return bytes per second since the start; an event with fewer bytes than before begins anew."""
        if event.done < self._before:
            self.restart()
        self._before = event.done
        return event.done / max(self._clock() - self._began, 1e-3)
