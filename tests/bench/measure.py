"""One move of one container, as its own program sees it."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from migrate.cli.exit_codes import EXIT_CODES
from migrate.lab import model
from tests.bench import writer
from tests.bench.usage import Groups, Meter
from tests.bench.ways import BUNDLE, NAME, SOURCE, TARGET, Failed, Ours, Way
from tests.system.conftest import Lab

AFTER = 10.0  # seconds after the gap in which further gaps are added up
_ROUNDED = 1e-4  # seconds by which the sum of two printed times may differ from a third


@dataclass(frozen=True)
class Load:
    """What the program does: it holds `memory` MiB, `shared` or private, and writes `dirty` MiB/s of them."""

    memory: int
    dirty: float
    shared: bool = False

    @property
    def arguments(self) -> list[str]:
        """The arguments of the program."""
        return [str(self.memory), f"{self.dirty:g}", *(["shared"] if self.shared else [])]


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
        writer.put_bundle(lab, host, BUNDLE, program, load.arguments)


@dataclass(frozen=True)
class Restored:
    """What a restore of a snapshot has cost: seconds from the start of the command until the program ran, and until the
    command had ended; and words of memory that were wrong."""

    runs: float
    total: float
    bad: int


def restore(way: Way) -> Restored:
    """Start the container, save it, restore it, have it check its memory, and remove it, all at the source."""
    try:
        way.start()
        way.until(SOURCE, lambda seen: seen.ready, "the program fills its memory")
        way.save()
        clock, began = time.time(), time.monotonic()
        way.restore()
        total = time.monotonic() - began
        seen = way.until(SOURCE, lambda seen: any(gap.end > clock for gap in seen.gaps), "the program goes on")
        way.check(SOURCE)
        seen = way.until(SOURCE, lambda seen: seen.checked, "the program checks its memory")
        return Restored(seen.longest(clock).end - clock, total, seen.bad)
    finally:
        way.remove()


def several(lab: Lab, count: int) -> dict[str, Any]:
    """Move `count` containers of the bundle: by one command if it takes several, otherwise one after the other.

    Return the seconds that it took, `how`, and the gap that each program saw.
    """
    way, names = Ours(lab), [f"{NAME}{number}" for number in range(1, count + 1)]
    try:
        for name in names:
            way.call(SOURCE, "pymigrate", "run", "-d", "-b", BUNDLE, name)
        clock, began = time.time(), time.monotonic()
        how = "pymigrate move a b c host2"
        done = lab.on(SOURCE, "pymigrate", "move", *names, TARGET, check=False)
        if done.returncode == EXIT_CODES["usage"][0]:
            how, clock, began = "pymigrate move in a loop", time.time(), time.monotonic()
            for name in names:
                way.call(SOURCE, "pymigrate", "move", name, TARGET)
        elif done.returncode:
            raise Failed(f"{how}: exit status {done.returncode}: {done.stderr.strip()}")
        seconds = time.monotonic() - began
        logs = [writer.parse(way.call(TARGET, "pymigrate", "logs", name)) for name in names]
        return {"seconds": seconds, "how": how, "gaps": [seen.longest(clock).long for seen in logs]}
    finally:
        for host in (SOURCE, TARGET):
            lab.sh(
                host,
                f"for id in {' '.join(names)}; do pymigrate delete -f $id 2>&1; done; rm -rf /var/lib/pymigrate/*",
                check=False,
            )


def measure(lab: Lab, way: Way) -> Run:
    """Start the container, move it, watch it, have it check its memory, and remove it."""
    hosts = [model.find(lab.name, host) for host in (SOURCE, TARGET)]
    try:
        way.start()
        way.until(SOURCE, lambda seen: seen.ready, "the program fills its memory")
        with Meter(lab, SOURCE, (Groups(tuple(hosts[0].cgroups)), Groups(tuple(hosts[1].cgroups)))) as meter:
            clock, began = time.time(), time.monotonic()
            report = way.move()
            total = time.monotonic() - began
            seen = way.until(TARGET, lambda seen: any(gap.end > clock for gap in seen.gaps), "the program goes on")
            gap = seen.longest(clock)
            time.sleep(max(0.0, gap.end + AFTER - time.time()))
            used = meter.read(gap)
        way.check(TARGET)
        seen = way.until(TARGET, lambda seen: seen.checked, "the program checks its memory")
        gap = seen.longest(clock)
        before, after = seen.sum(clock, gap.start), seen.sum(gap.end - _ROUNDED, gap.end + AFTER)
        return Run(gap.long, before, after, total, used.wire, used.cpu, used.memory, seen.bad, report)
    finally:
        way.remove()
