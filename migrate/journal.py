"""The phase log of a move, kept at both ends: one JSON line a step, on disk before the step's consequence.

`/var/lib/pymigrate/migrations/<migration id>.jsonl`. The first line says who moves what where; each further line
adds what it knows. The COMMITTED line of the source is the one point of no return.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from migrate.errors import MigrateError
from migrate.phases import NEXT, Phase
from migrate.protocol import check_migration_id

DIRECTORY = Path("/var/lib/pymigrate/migrations")


def new_migration_id() -> str:
    """Sorts by time and cannot be guessed: 20261124T093000-0123456789abcdef."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + "-" + secrets.token_hex(8)


@dataclass(frozen=True)
class Entry:
    """What a journal says of one move: the merged fields of its lines, and the last phase."""

    migration: str
    role: str
    id: str
    source: str
    target: str
    phase: Phase
    started: str
    updated: str
    fields: dict[str, Any]


class Journal:
    """Appends to one journal; refuses a phase that may not follow the last one."""

    def __init__(self, path: Path, phase: Phase | None) -> None:
        self._path, self.phase = path, phase

    @classmethod
    def begin(cls, migration: str, *, directory: Path = DIRECTORY, **fields: Any) -> Self:
        """Start the journal of a move at PREFLIGHT. `fields`: role, id, source, target, and what else is known."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = directory / f"{check_migration_id(migration)}.jsonl"
        journal = cls(path, None)
        journal.record(Phase.PREFLIGHT, migration=migration, **fields)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return journal

    @classmethod
    def resume(cls, entry: Entry, *, directory: Path = DIRECTORY) -> Self:
        """Go on with the journal that `entry` was read from."""
        return cls(directory / f"{check_migration_id(entry.migration)}.jsonl", entry.phase)

    def record(self, phase: Phase, *, durable: bool = True, **fields: Any) -> None:
        """Write one line and, unless `durable` is false, wait until the disk has it."""
        if phase not in NEXT[self.phase]:
            raise MigrateError(f"a move cannot go from {self.phase} to {phase}")
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "phase": phase, **fields}
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(line).encode() + b"\n")
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        self.phase = phase


def load(migration: str, *, directory: Path = DIRECTORY) -> Entry | None:
    """The entry of one move, or None. A line torn by a crash ends the reading; what is before it counts."""
    try:
        lines = (directory / f"{check_migration_id(migration)}.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return None
    merged: dict[str, Any] = {}
    started = ""
    for line in lines:
        try:
            merged |= json.loads(line)
        except (ValueError, TypeError):
            break
        started = started or str(merged.get("time"))
    try:
        return Entry(
            migration=migration,
            role=merged["role"],
            id=merged["id"],
            source=merged["source"],
            target=merged["target"],
            phase=Phase(merged["phase"]),
            started=started,
            updated=merged["time"],
            fields=merged,
        )
    except (KeyError, ValueError):
        return None


def entries(*, directory: Path = DIRECTORY) -> Iterator[Entry]:
    """All moves this host has taken part in, oldest first."""
    for path in sorted(directory.glob("*.jsonl")):
        entry = load(path.stem, directory=directory)
        if entry is not None:
            yield entry
