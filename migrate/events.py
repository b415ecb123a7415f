"""What a move reports while it runs. The engine emits events; a terminal, plain lines and JSON are monitors."""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class PhaseStarted:
    """A phase of the move begins. `text` is one line for people."""

    phase: str
    text: str


@dataclass(frozen=True)
class Progress:
    """`done` bytes so far in this phase, of `total` (None where that is not known)."""

    phase: str
    done: int
    total: int | None = None


@dataclass(frozen=True)
class Warned:
    """Something the user should know that does not stop the move."""

    message: str


@dataclass(frozen=True)
class PassDone:
    """A pass over one tree is over: bytes over the connection, files (of a first pass those that were sent, later the
    names that had changed), seconds; `frozen`: the container was frozen meanwhile."""

    tree: str
    number: int
    frozen: bool
    bytes_sent: int
    files: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """How a move ended. Times in seconds, sizes in bytes; `phases` maps a step to its duration.

    `downtime_s` runs from the freeze (CRIU is allowed to seize the first task) to the moment the target's
    confirmation that the container runs is back at the source: one clock, the source's monotonic one.
    """

    id: str
    source: str
    target: str
    mode: str
    workload: str
    downtime_s: float
    total_s: float
    bytes_sent: int
    phases: dict[str, float] = field(default_factory=dict)
    passes: tuple[PassDone, ...] = ()


Event = PhaseStarted | Progress | Warned | PassDone | Report

_NAMES: dict[type[Event], str] = {
    PhaseStarted: "phase",
    Progress: "progress",
    Warned: "warning",
    PassDone: "pass",
    Report: "report",
}


def event_name(event: Event) -> str:
    """The value of "event" in JSON output."""
    return _NAMES[type(event)]


class Monitor(Protocol):
    """Takes events; must not block or fail. `close` puts the terminal back as it was."""

    def emit(self, event: Event) -> None: ...

    def close(self) -> None: ...
