"""The container of a benchmark: writer.c in a bundle of its own, and what it says of its gaps and its memory."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.spec.default import default_spec
from tests.support.hosts import Hosts

GAP = 0.02  # seconds that the program must stand still before it says so
_SOURCE = Path(__file__).with_name("writer.c")
_PLACES = ("dev", "proc", "sys", "tmp")


@dataclass(frozen=True)
class Gap:
    """When the program stood still: `start` by the wall clock, `long` seconds."""

    start: float
    long: float

    @property
    def end(self) -> float:
        return self.start + self.long


@dataclass(frozen=True)
class Seen:
    """What the program has written: whether its memory is filled, its gaps, the words that were wrong.

    `checked`: a check of all words, which was asked for, has ended.
    """

    ready: bool
    gaps: tuple[Gap, ...]
    bad: int
    checked: bool

    def longest(self, since: float) -> Gap:
        """Return the longest gap that ended after a time. Raises ValueError if there is none."""
        found = [gap for gap in self.gaps if gap.end > since]
        if not found:
            raise ValueError(f"the program did not stand still for {GAP:g} s: it was not moved")
        return max(found, key=lambda gap: gap.long)

    def sum(self, since: float, until: float) -> float:
        """Return the seconds of all gaps that began between two times."""
        return sum(gap.long for gap in self.gaps if since <= gap.start < until)


def parse(text: str) -> Seen:
    """Return what the program has written; a line that is not finished, or not the program's, counts for nothing."""
    gaps, bad, ready, checked = [], 0, False, False
    for line in text.splitlines(keepends=True):
        match line.split() if line.endswith("\n") else []:
            case ["ready"]:
                ready = True
            case ["gap", start, long]:
                gaps.append(Gap(float(start), float(long)))
            case ["bad" | "checked" as word, count]:
                bad, checked = int(count), checked or word == "checked"
    return Seen(ready, tuple(gaps), bad, checked)


def build(directory: Path) -> Path:
    """Compile the program. Raises SystemExit if that fails."""
    program = directory / "writer"
    done = subprocess.run(
        ["gcc", "-O2", "-static", "-o", str(program), str(_SOURCE)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"bench: {_SOURCE} cannot be compiled: {done.stderr.strip()}")
    return program


def put_bundle(hosts: Hosts, host: str, place: str, program: Path, arguments: Sequence[str]) -> None:
    """Make a bundle at a host that runs the program; runc takes it too."""
    with tempfile.TemporaryDirectory() as directory:
        bundle = Path(directory, "bundle")
        for name in _PLACES:
            (bundle / "rootfs" / name).mkdir(parents=True)
        (bundle / "rootfs" / "writer").hardlink_to(program)
        config = default_spec()
        config["ociVersion"] = "1.0.2"  # the newest that runc 1.1 knows
        config["process"]["args"] = ["/writer", *arguments]
        (bundle / "config.json").write_text(json.dumps(config))
        hosts.put(host, bundle, place)
