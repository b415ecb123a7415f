"""How long a gap will be: pure functions of what is known before it.

    gap = fixed part + what is left to send / bandwidth

The fixed part follows a model, scaled by how long the fixed parts of earlier moves have really taken.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from migrate.memory import convergence
from migrate.memory.convergence import Round, Verdict

GIB = 1 << 30
# The parts of a gap.
BASE, PROCESSES, PINNED, ROUND_TRIPS = "freeze and restore", "processes", "pinned memory", "round trips"
EAGER, LAST_PAGES, ALL_PAGES = "eager restore", "last pages", "memory in the freeze"
SHARED = "shared memory"
# Seconds, measured between two lab hosts: freeze, images, restore and handover of a small container; each process
# more; for each GiB the pages that CRIU pins; those that a restore which waits for them copies twice; and shared
# memory, which CRIU hands over to be compared in the dump, and copies in the restore.
_BASE, _PROCESS, _PINNED, _EAGER, _SHARED = 0.09, 0.003, 0.08, 1.3, 1.0
_ROUND_TRIPS = 6  # in the freeze
_FEW = 3  # moves that are alike say more than others
_MOST = 10  # moves to learn from
_SIMILAR = 4.0  # times more or less memory
_SCALES = (0.1, 20.0)  # what one earlier move may say at most
DOUBT = 0.25  # of a prediction, without earlier moves to tell more


@dataclass(frozen=True)
class Load:
    """What the fixed part depends on: bytes of `memory` in all `processes`, seconds for a round trip.

    `eager`: the restore waits until all memory is in place. `shared`: bytes of shared memory that is sent before the
    freeze; the restore waits for it in any case.
    """

    memory: int
    processes: int
    round_trip: float = 0.0
    eager: bool = False
    shared: int = 0

    def parts(self) -> dict[str, float]:
        """Return the parts of the fixed part by the model, in seconds, by name."""
        parts = {
            BASE: _BASE,
            PROCESSES: _PROCESS * self.processes,
            PINNED: _PINNED * self.memory / GIB,
            ROUND_TRIPS: _ROUND_TRIPS * self.round_trip,
        }
        parts |= {EAGER: _EAGER * self.memory / GIB} if self.eager else {}
        return parts | ({SHARED: _SHARED * self.shared / GIB} if self.shared else {})

    def fixed(self) -> float:
        """Return the seconds of the fixed part by the model."""
        return sum(self.parts().values())


@dataclass(frozen=True)
class Past:
    """An earlier move to `target`: its fixed part took `fixed` seconds; `overhead` is its time outside gap and rounds.

    `expected` is the gap that was predicted, and `gap` the real one.
    """

    target: str
    load: Load
    fixed: float
    overhead: float
    expected: float = 0.0
    gap: float = 0.0


@dataclass(frozen=True)
class Scale:
    """What the model of the fixed part is multiplied with, and a range of it."""

    middle: float = 1.0
    low: float = 1 - DOUBT
    high: float = 1 + DOUBT


def like(past: Sequence[Past], target: str, load: Load) -> list[Past]:
    """Return the moves to learn from, of earlier ones from new to old.

    They are those to the same target, of these the ones that were restored in the same way, and of these the ones of
    containers with as much memory; each only if that leaves some.
    """
    found = list(past)
    kinds: tuple[Callable[[Past], bool], ...] = (
        lambda move: move.target == target,
        lambda move: move.load.eager == load.eager,
        lambda move: 1 / _SIMILAR <= (move.load.memory + 1) / (load.memory + 1) <= _SIMILAR,
    )
    for is_alike in kinds:
        alike = [move for move in found if is_alike(move)]
        found = alike if len(alike) >= _FEW else found
    return found[:_MOST]


def scale(past: Sequence[Past]) -> Scale:
    """Return what earlier moves say of the model: the median, and the quartiles as the range."""
    ratios = sorted(min(_SCALES[1], max(_SCALES[0], move.fixed / move.load.fixed())) for move in past)
    if not ratios:
        return Scale()
    middle = statistics.median(ratios)
    if len(ratios) < _FEW:
        return Scale(middle, middle * (1 - DOUBT), middle * (1 + DOUBT))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Scale(middle, min(low, middle * 0.9), max(high, middle * 1.1))


@dataclass(frozen=True)
class Written:
    """How the set of pages that a program writes grows: points (seconds, bytes) in order, and all that it can write."""

    points: tuple[tuple[float, int], ...]
    most: int

    def after(self, seconds: float) -> float:
        """Return the bytes that are written in so many seconds, each page once. Beyond the last point it is a guess."""
        before, last = (0.0, 0), (0.0, 0)
        for point in self.points:
            before, last = last, point
            if seconds <= point[0]:
                break
        slope = (last[1] - before[1]) / max(last[0] - before[0], 1e-6)
        return max(0.0, min(float(self.most), before[1] + slope * (seconds - before[0])))

    @property
    def rate(self) -> float:
        """Bytes that are written in a second."""
        return self.after(1.0)


@dataclass(frozen=True)
class Aim:
    """What the user wants of the rounds."""

    max_downtime: float
    max_rounds: int
    limit: float = math.inf  # of the bandwidth in rounds, in bytes per second


@dataclass(frozen=True)
class Run:
    """A simulated move: its rounds, how they end, and the parts of the gap after them in seconds."""

    verdict: Verdict
    rounds: tuple[Round, ...]
    parts: dict[str, float]

    @property
    def gap(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """Seconds of rounds and gap."""
        return sum(item.seconds for item in self.rounds) + self.gap

    @property
    def size(self) -> int:
        """Bytes of memory that are sent in rounds and in the gap."""
        return sum(item.read for item in self.rounds) + (self.rounds[-1].left if self.rounds else 0)


def simulate(
    load: Load, written: Written | None, rest: int, bandwidth: float, aim: Aim, scaled: float = 1.0, doubt: float = 1.0
) -> Run:
    """Return how a move would go.

    `written`: None if memory is not sent in rounds. `rest`: bytes that go in the freeze in any case. `bandwidth`: bytes
    of memory in a second. `scaled`: what the model of the fixed part is multiplied with. `doubt`: the same for what is
    written, and for the time that it takes to send it.
    """
    parts = {name: seconds * scaled for name, seconds in load.parts().items()}
    bandwidth = max(bandwidth / doubt, 1.0)
    slower = min(bandwidth, aim.limit)
    parts[ALL_PAGES] = rest / bandwidth
    if written is None:
        return Run(Verdict.SWITCH, (), parts)
    fixed, rounds, verdict = sum(parts.values()), [], Verdict.CONTINUE
    left, shared = float(written.most), load.shared
    while verdict is Verdict.CONTINUE:
        read, shared = left + shared, 0  # shared memory is sent once
        seconds = read / slower + convergence.ROUND
        left = min(float(written.most), written.after(seconds) * doubt)
        rounds.append(Round(int(read), seconds, int(left), read / slower - read / bandwidth))
        verdict = convergence.judge(rounds, fixed=fixed, max_downtime=aim.max_downtime, max_rounds=aim.max_rounds)
    return Run(verdict, tuple(rounds), parts | {LAST_PAGES: rounds[-1].left / bandwidth})
