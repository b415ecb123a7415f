"""When to freeze a container whose memory is sent while it runs: a pure function of the rounds so far.

The gap that would follow is estimated as a fixed part (forecast.py), plus the time for what is left. Another round is
worth its time while it shortens the gap noticeably. Memory that is written faster than it is sent does not converge.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

_WORTH = 0.010  # seconds by which another round must shorten the gap
_SHRINKS = 0.85  # of what was left before a round is left after it, at most, as long as the rounds converge
ROUND = 0.02  # seconds that even an empty round takes
_SLOWEST = 1 << 10  # bytes per second: what was never sent has no bandwidth


class Verdict(enum.Enum):
    CONTINUE = "another round"
    SWITCH = "switch over"
    OUT_OF_REACH = "the fixed part of the gap alone takes longer than the limit"
    DIVERGED = "the program writes its memory faster than it can be sent"


@dataclass(frozen=True)
class Round:
    """One round: `read` bytes of memory were sent in `seconds`, after which `left` bytes are to be sent again.

    `held`: seconds of these in which a bandwidth limit had nothing sent. It does not hold in the freeze.
    """

    read: int
    seconds: float
    left: int
    held: float = 0.0

    @property
    def dirty_rate(self) -> float:
        """Bytes that the program writes in a second; a page that it writes twice in a round counts once."""
        return self.left / max(self.seconds, 1e-6)


def bandwidth(rounds: Sequence[Round]) -> float:
    """Return bytes of memory that are sent in a second: that of the largest round, because small ones are noise."""
    largest = max(rounds, key=lambda item: item.read)
    return max(_SLOWEST, largest.read / max(largest.seconds, 1e-6))


def frozen_bandwidth(rounds: Sequence[Round]) -> float:
    """Return the same for the freeze, in which no limit holds."""
    return bandwidth([Round(item.read, item.seconds - item.held, item.left) for item in rounds])


def expected_gap(rounds: Sequence[Round], fixed: float) -> float:
    """Return the gap if the container were frozen now, in seconds."""
    return fixed + rounds[-1].left / frozen_bandwidth(rounds)


def judge(rounds: Sequence[Round], *, fixed: float, max_downtime: float, max_rounds: int) -> Verdict:
    """Return what to do after these rounds; there are always at least two."""
    if len(rounds) < 2:
        return Verdict.CONTINUE
    gap, speed = expected_gap(rounds, fixed), bandwidth(rounds)
    last, before = rounds[-1], rounds[-2]
    sending = last.left / speed
    next_left = min(last.left, last.dirty_rate * (sending + ROUND))
    shrinks = last.left < before.left * _SHRINKS
    worth = shrinks and (last.left - next_left) / speed > _WORTH
    if len(rounds) < max_rounds and worth:
        return Verdict.CONTINUE
    if gap <= max_downtime:
        return Verdict.SWITCH
    if fixed > max_downtime and gap < 2 * fixed:
        return Verdict.OUT_OF_REACH
    if len(rounds) < max_rounds and shrinks:
        return Verdict.CONTINUE
    return Verdict.DIVERGED
