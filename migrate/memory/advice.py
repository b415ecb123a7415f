"""What the largest part of a predicted gap is, and what would halve it, in words."""

import math

from migrate.memory import forecast
from migrate.memory.convergence import Verdict
from migrate.memory.forecast import Load, Run

_MIB, _GIB = 1 << 20, 1 << 30


def dominant(run: Run) -> str:
    """Return the name of the largest part of the gap."""
    return max(run.parts, key=run.parts.__getitem__)


def advice(run: Run, load: Load, *, rate: float, bandwidth: float, reason: str = "") -> str:
    """Return what would halve the largest part of the gap.

    `rate` is what the program writes, and `bandwidth` what is sent, in bytes per second. `reason`: why memory goes in
    the freeze, or why the restore waits for it.
    """
    because = f", because {reason}" if reason else ""
    if dominant(run) == forecast.LAST_PAGES and run.verdict is Verdict.DIVERGED:
        written = f"memory is written too fast ({rate / _MIB:.0f} MiB/s, and {bandwidth / _MIB:.0f} MiB/s are sent)"
        return (
            f"{written}: a faster connection or --on-divergence throttle; or accept it: --max-downtime {_up(run.gap)}"
        )
    return {
        forecast.LAST_PAGES: "a connection twice as fast, or a program that writes half as much",
        forecast.ALL_PAGES: f"a connection twice as fast: this memory is sent in the freeze{because}",
        forecast.PINNED: f"half the memory: CRIU pins {load.memory / _GIB:.1f} GiB, page by page",
        forecast.PROCESSES: f"half the processes: {load.processes} are frozen and restored",
        forecast.ROUND_TRIPS: f"a nearer target: a round trip takes {load.round_trip * 1000:.1f} ms",
        forecast.SHARED: f"half the shared memory: freeze and restore copy {load.shared / _GIB:.1f} GiB",
        forecast.EAGER: f"half the memory: the restore waits for all of it{because}",
        forecast.BASE: "nothing can that the container decides: every freeze and restore takes as long",
    }[dominant(run)]


def _up(seconds: float) -> str:
    """Return a number of seconds, rounded up to what one would type."""
    return f"{math.ceil(seconds * 1.1)}" if seconds > 2 else f"{math.ceil(seconds * 11) / 10:g}"
