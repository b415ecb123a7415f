"""What moves cost as memory grows, beside runc and ssh: `python -m tests.bench.memory`, in one run and by turns.

Each round does the same move once in every way, one after the other, so that a slow moment of the machine meets all of
them. The program in the container measures how long it stands still, and checks its memory. The tables show medians,
and ratios of the same round. Also: a snapshot that is restored, and several small containers that move.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench import links, writer
from tests.bench.links import LINKS, Link
from tests.bench.machine import check_memory, machine
from tests.bench.measure import Load, measure, put_bundles, restore, several
from tests.bench.options import PARTS, parse
from tests.bench.picture import draw
from tests.bench.table import load as words_of
from tests.bench.table import seconds, text
from tests.bench.ways import Ours, Runc, Way
from tests.system.conftest import Lab

_FAILURES = (SystemExit, AssertionError, subprocess.SubprocessError, OSError, ValueError)
Result = dict[str, Any]
Job = tuple[str, dict[str, Any], Load, Callable[[Lab], dict[str, Any]]]  # part, key of its record, load, work


def move_jobs(wanted: argparse.Namespace, link: Link) -> Iterator[Job]:
    """Yield the moves over one link: every load, every round, every way."""
    for memory in wanted.memory:
        for dirty in wanted.dirty if memory <= link.largest else ():
            for number in range(wanted.rounds):
                for way in wanted.ways:
                    key = {"link": link.key, "memory": memory, "dirty": dirty, "way": way.key, "round": number}
                    yield "moves", key, Load(memory, dirty), _move(way)


def _move(way: type[Way]) -> Callable[[Lab], dict[str, Any]]:
    return lambda lab: dataclasses.asdict(measure(lab, way(lab)))


def _restore(way: type[Way]) -> Callable[[Lab], dict[str, Any]]:
    return lambda lab: dataclasses.asdict(restore(way(lab)))


def other_jobs(wanted: argparse.Namespace) -> Iterator[Job]:
    """Yield the restores of snapshots, and the moves of several containers."""
    if "snapshots" in wanted.parts:
        for number in range(wanted.rounds):
            for way in (way for way in (Ours, Runc) if way in wanted.ways):
                key = {"memory": wanted.snapshot, "way": way.key, "round": number}
                yield "snapshots", key, Load(wanted.snapshot, 0), _restore(way)
    if "several" in wanted.parts:
        for number in range(wanted.rounds):
            key = {"memory": 16, "count": wanted.containers, "round": number}
            yield "several", key, Load(16, 0), lambda lab: several(lab, wanted.containers)


def run(wanted: argparse.Namespace, result: Result) -> None:
    """Do all jobs and add what they find to `result`; one that fails is noted there, and gets a new lab after it."""
    with tempfile.TemporaryDirectory() as directory:
        program = writer.build(Path(directory))
        for link in LINKS:
            jobs = list(move_jobs(wanted, link)) if link.key in wanted.links and "moves" in wanted.parts else []
            if not link.rate:
                jobs += other_jobs(wanted)
            while jobs:
                with links.lab(f"bench-{os.getpid()}", link) as lab:
                    _work(lab, program, jobs, result)


def _work(lab: Lab, program: Path, jobs: list[Job], result: Result) -> None:
    """Do jobs until none is left or one has failed."""
    at_hosts = None
    while jobs:
        part, key, load, job = jobs.pop(0)
        if load != at_hosts:
            put_bundles(lab, program, load)
            at_hosts = load
        try:
            record = key | job(lab)
        except _FAILURES as error:
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                raise  # SIGTERM
            result[part].append(key | {"error": f"{' '.join(map(str, key.values()))}: {error}"})
            print(f"    {key}: failed: {error}", file=sys.stderr, flush=True)
            return
        result[part].append(record)
        print(f"    {said(part, record)}", file=sys.stderr, flush=True)


def said(part: str, record: dict[str, Any]) -> str:
    """Return one line on what a job has found, for those who wait."""
    if part == "several":
        return f"{record['count']} containers: {seconds(record['seconds'])}, {record['how']}"
    found = record["runs"] if part == "snapshots" else record["gap"]
    what = "snapshot" if part == "snapshots" else f"{record['link']}, {words_of(record['memory'], record['dirty'])}"
    return f"{what}, {record['way']}, round {record['round'] + 1}: {seconds(found)}, bad {record['bad']}"


def save(result: Result, directory: Path) -> None:
    """Write the figures and the picture."""
    (directory / "bench-memory.json").write_text(json.dumps(result, indent=1) + "\n")
    (directory / "bench-memory.svg").write_text(draw(result))


def main() -> None:
    wanted = parse(__doc__)
    if wanted.draw:
        result = json.loads(wanted.draw.read_text())
    else:
        check_memory(max(wanted.memory))
        result = {"machine": machine(), "command": sys.argv[1:], "complete": False, **{part: [] for part in PARTS}}
        with contextlib.suppress(KeyboardInterrupt):
            run(wanted, result)
            result["complete"] = True
    print(text(result), end="")
    if wanted.output:
        save(result, wanted.output)
    if not result["complete"]:
        raise SystemExit(130)
    if any("error" in record for part in PARTS for record in result[part]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
