"""Monitors for logs and programs: plain lines, or one JSON object per line."""

import dataclasses
import json
import time
from typing import Any, TextIO

from migrate.events import (
    Event,
    ModeChosen,
    PassDone,
    PhaseStarted,
    Planned,
    Progress,
    Report,
    RoundDone,
    Throttled,
    Warned,
)
from migrate.ui import text
from migrate.ui.pace import Pace

_INTERVAL = 1.0  # seconds between two progress lines of one phase


class PlainLines:
    """One line for each phase, at most one progress line a second, and the timeline at the end."""

    def __init__(self, out: TextIO, *, several: bool = False) -> None:
        self._out, self._start, self._last = out, time.monotonic(), 0.0
        self._several, self._name, self._pace = several, "", Pace()

    def emit(self, event: Event) -> None:
        now = time.monotonic()
        self._name = f"{event.id}: " if self._several else ""
        match event:
            case PhaseStarted():
                self._last = now
                self._pace.restart()
                self._line(now, f"{event.phase}: {event.text}")
            case Progress():
                if now - self._last >= _INTERVAL:
                    self._last = now
                    self._line(now, f"{event.phase}: {text.progress(event.done, event.total, self._pace.of(event))}")
            case Warned():
                self._line(now, f"warning: {event.message}")
            case PassDone():
                self._line(now, text.one_pass(event))
            case ModeChosen():
                self._line(now, text.mode(event))
            case RoundDone():
                self._last = now
                self._pace.restart()
                self._line(now, text.one_round(event))
            case Throttled():
                self._line(now, text.throttled(event))
            case Planned():
                for line in text.plan(event):
                    self._line(now, line)
            case Report():
                for line in text.timeline(event):
                    self._line(now, f"  {line}")
                self._name = ""  # the summary names it
                self._line(now, text.summary(event))

    def close(self) -> None:
        self._out.flush()

    def _line(self, now: float, line: str) -> None:
        print(f"{now - self._start:8.3f}  {self._name}{line}", file=self._out, flush=True)


class JsonLines:
    """One object a line: {"event", "id", "migration", ...}, where "event" is the `event` of a class in events.py.

    The last one is the report.
    """

    def __init__(self, out: TextIO) -> None:
        self._out, self._last = out, 0.0

    def emit(self, event: Event) -> None:
        if isinstance(event, Progress):
            now = time.monotonic()
            if now - self._last < _INTERVAL:
                return
            self._last = now
        fields = _rounded(dataclasses.asdict(event))
        print(json.dumps({"event": event.event, **fields}), file=self._out, flush=True)

    def close(self) -> None:
        self._out.flush()


def _rounded(value: Any) -> Any:
    """Return a JSON value with each float rounded to six digits: microseconds."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value
