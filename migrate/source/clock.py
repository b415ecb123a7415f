"""Durations of the steps of one move."""

import time


class Clock:
    """Runs from its construction, on the monotonic clock."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self.steps: dict[str, float] = {}  # seconds

    def step(self, name: str, *, until: float | None = None) -> None:
        """Add the time since the last step, up to now or `until`, to the step `name`."""
        now = time.monotonic() if until is None else until
        self.steps[name] = self.steps.get(name, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._started
