"""One move of one container, as its own program sees it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrate.lab import model
from tests.bench import writer
from tests.bench.usage import Groups, Meter
from tests.bench.ways import BUNDLE, SOURCE, TARGET, Way
from tests.system.conftest import Lab

AFTER = 10.0  # seconds after the gap in which further gaps are added up


@dataclass(frozen=True)
class Load:
    """What the program does: it holds `memory` MiB and writes `dirty` MiB/s of them."""

    memory: int
    dirty: float


@dataclass(frozen=True)
class Run:
    """What one move has cost: seconds and bytes.

    `gap`: how long the program stood still; `before` and `after`: the sums of its other gaps until then and in the next
    AFTER seconds; `total`: from the start of the command to its end; `bad`: words of memory that were wrong; `cpu`,
    `peak` and `wire` as in usage.Used; `report`: what the tool itself said.
    """

    gap: float
    before: float
    after: float
    total: float
    wire: int
    cpu: tuple[float | None, float | None]
    peak: tuple[int | None, int | None]
    bad: int
    report: dict[str, Any] = field(default_factory=dict)


def put_bundles(lab: Lab, program: Path, load: Load) -> None:
    """Put the bundle at both hosts, in place of an older one."""
    for host in (SOURCE, TARGET):
        lab.sh(host, f"rm -rf {BUNDLE}")
        writer.put_bundle(lab, host, BUNDLE, program, load.memory, load.dirty)


def measure(lab: Lab, way: Way) -> Run:
    """Start the container, move it, watch it, have it check its memory, and remove it."""
    hosts = [model.find(lab.name, host) for host in (SOURCE, TARGET)]
    try:
        way.start()
        way.until(SOURCE, lambda seen: seen.ready, "the program fills its memory")
        meter = Meter(lab, SOURCE, (Groups(tuple(hosts[0].cgroups)), Groups(tuple(hosts[1].cgroups))))
        with meter:
            clock, began = time.time(), time.monotonic()
            report = way.move()
            total = time.monotonic() - began
            seen = way.until(TARGET, lambda seen: any(gap.end > clock for gap in seen.gaps), "the program goes on")
            gap = seen.longest(clock)
            time.sleep(max(0.0, gap.end + AFTER - time.time()))
            used = meter.read(gap)
        way.check()
        seen = way.until(TARGET, lambda seen: seen.checked, "the program checks its memory")
        gap = seen.longest(clock)
        before, after = seen.sum(clock, gap.start), seen.sum(gap.end, gap.end + AFTER)
        return Run(gap.long, before, after, total, used.wire, used.cpu, used.memory, seen.bad, report)
    finally:
        way.remove()
