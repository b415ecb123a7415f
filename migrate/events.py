"""What a move reports while it runs. The move emits events; a terminal, plain lines and JSON are monitors.

Each event names the container and the move, because several moves may share a monitor.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from criu_rpc.errors import Error


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that has happened in the move `migration` of the container `id`."""

    event: ClassVar[str]  # the value of "event" in JSON output
    id: str
    migration: str


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A phase of the move begins. `text` is one line for people."""

    event = "phase"
    phase: str
    text: str


@dataclass(frozen=True)
class Progress(Event):
    """`done` bytes so far in this phase, of `total` (None if that is unknown)."""

    event = "progress"
    phase: str
    done: int
    total: int | None = None


@dataclass(frozen=True)
class Warned(Event):
    """Something that the user should know and that does not stop the move."""

    event = "warning"
    message: str


@dataclass(frozen=True)
class PassDone(Event):
    """A pass over one tree has ended.

    `bytes_sent` went over the connection. `files` counts the files that a first pass sent, and the names that had
    changed in a later one. `frozen`: the container was frozen meanwhile.
    """

    event = "pass"
    tree: str
    number: int
    frozen: bool
    bytes_sent: int
    files: int
    seconds: float


@dataclass(frozen=True)
class ModeChosen(Event):
    """How memory travels (model.MigrationMode), and why, in words."""

    event = "mode"
    mode: str
    reason: str


@dataclass(frozen=True)
class RoundDone(Event):
    """A round over the memory of the running container has ended.

    `bytes_read` of memory were sent, as `bytes_sent` on the wire, in `seconds`. The container has written `dirty_rate`
    bytes per second meanwhile, of which `left` bytes are to be sent again; `bandwidth` is in bytes per second. The gap
    would take `expected_gap` seconds if the container were frozen now.
    """

    event = "round"
    number: int
    bytes_read: int
    bytes_sent: int
    seconds: float
    left: int
    dirty_rate: float
    bandwidth: float
    expected_gap: float


@dataclass(frozen=True)
class Throttled(Event):
    """From now on until it is frozen, the container gets `percent` less processor time than it used before."""

    event = "throttle"
    percent: int


@dataclass(frozen=True)
class Report(Event):
    """How a move ended. Times in seconds, sizes in bytes; `phases` maps a step to its duration.

    `downtime_s` runs from the freeze (CRIU may seize the first task) to the moment when the target's confirmation that
    the container runs arrives at the source: one clock, the source's monotonic one. `memory_bytes` of pages and their
    names became `memory_sent` on the wire by compression.
    """

    event = "report"
    source: str
    target: str
    mode: str
    workload: str
    downtime_s: float
    total_s: float
    bytes_sent: int
    phases: dict[str, float] = field(default_factory=dict)
    passes: tuple[PassDone, ...] = ()
    mode_reason: str = ""
    rounds: tuple[RoundDone, ...] = ()
    expected_gap_s: float | None = None
    memory_bytes: int = 0
    memory_sent: int = 0


SHOWN: dict[str, type[Event]] = {
    cls.event: cls for cls in (PhaseStarted, ModeChosen, RoundDone, Throttled, Progress, PassDone, Warned)
}  # what another process can follow, by kind; the report says it all again


@dataclass(frozen=True)
class Planned(Event):
    """How a move would go. Nothing was moved or changed.

    Times in seconds, sizes in bytes, rates in bytes per second. `gap_s` is expected, and is likely to be between
    `gap_low_s` and `gap_high_s`; `parts` are its parts. `bytes` of memory would be sent in `rounds` rounds and in the
    gap, and up to `files` of files. `written` are points: the program had written so many bytes after so many seconds,
    each page once. `dominant` is the largest part, and `advice` says what would halve it. `converges`: memory is
    sent faster than it is written. `unmeasured`: what is not in the prediction, in words.
    """

    event = "plan"
    target: str
    mode: str
    reason: str
    gap_s: float
    gap_low_s: float
    gap_high_s: float
    total_s: float
    bytes: int
    files: int
    rounds: int
    converges: bool
    memory: int
    processes: int
    written: tuple[tuple[float, int], ...]
    dirty_rate: float
    bandwidth: float
    round_trip_s: float
    earlier_moves: int
    parts: dict[str, float]
    dominant: str
    advice: str
    unmeasured: tuple[str, ...] = ()


class Monitor(Protocol):
    """Takes events; must not block or fail. `close` puts the terminal back as it was."""

    def emit(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Reporter:
    """Emits the events of one move."""

    def __init__(self, monitor: Monitor, id: str, migration: str) -> None:
        self.emit = monitor.emit
        self._id, self._migration = id, migration

    @contextlib.contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Have an error of the block name container and move, because `--json` shows it as an event as well."""
        try:
            yield
        except Error as error:
            error.move = {"id": self._id, "migration": self._migration}
            raise

    def phase(self, phase: str, text: str) -> None:
        self.emit(PhaseStarted(phase, text, id=self._id, migration=self._migration))

    def progress(self, phase: str, done: int, total: int | None = None) -> None:
        self.emit(Progress(phase, done, total, id=self._id, migration=self._migration))

    def warn(self, message: str) -> None:
        self.emit(Warned(message, id=self._id, migration=self._migration))

    def mode(self, mode: str, reason: str) -> None:
        self.emit(ModeChosen(mode, reason, id=self._id, migration=self._migration))

    def throttled(self, percent: int) -> None:
        self.emit(Throttled(percent, id=self._id, migration=self._migration))

    def round_done(self, number: int, **figures: Any) -> RoundDone:
        """Emit the end of a round, and return it for the report. `figures` are the other fields of RoundDone."""
        done = RoundDone(number, **figures, id=self._id, migration=self._migration)
        self.emit(done)
        return done

    def pass_done(
        self, tree: str, number: int, *, frozen: bool, bytes_sent: int, files: int, seconds: float
    ) -> PassDone:
        """Emit the end of a pass, and return it for the report."""
        done = PassDone(tree, number, frozen, bytes_sent, files, seconds, id=self._id, migration=self._migration)
        self.emit(done)
        return done
