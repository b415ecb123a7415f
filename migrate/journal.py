"""The phase log of a move, kept at both ends: one JSON line a step, on disk before the step's consequence.

`/var/lib/pymigrate/migrations/<migration id>.jsonl`. The first line says who moves what where; each further line
adds what it knows. The COMMITTED line of the source is the one point of no return.

A line is written whole or not at all. While nothing is frozen yet, room is reserved for the lines that are still to
come: a disk that fills up during the move does not keep its end from being noted.
"""

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from migrate.atomic import sync_directory
from migrate.errors import MigrateError
from migrate.phases import FINAL, NEXT, Phase
from migrate.protocol import check_migration_id
from migrate.space import FULL, no_space
from runtime import syscalls

DIRECTORY = Path("/var/lib/pymigrate/migrations")
ROOM = 64 << 10  # bytes for all lines that follow SEED


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
        """Start the journal of a move at PREFLIGHT. `fields`: role, id, source, target, and what else is known.

        Raises NoSpace, MigrateError; there is no journal then.
        """
        path = directory / f"{check_migration_id(migration)}.jsonl"
        journal = cls(path, None)
        try:
            with _errors(path, ROOM):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            journal.record(Phase.PREFLIGHT, migration=migration, **fields)
            with _errors(path):
                sync_directory(directory)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return journal

    @classmethod
    def resume(cls, entry: Entry, *, directory: Path = DIRECTORY) -> Self:
        """Go on with the journal that `entry` was read from."""
        return cls(directory / f"{check_migration_id(entry.migration)}.jsonl", entry.phase)

    def record(self, phase: Phase, *, durable: bool = True, **fields: Any) -> None:
        """Write one line and, unless `durable` is false, wait until the disk has it.

        Raises NoSpace, MigrateError; the journal is what it was then.
        """
        if phase not in NEXT[self.phase]:
            raise MigrateError(f"a move cannot go from {self.phase} to {phase}")
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "phase": phase, **fields}
        data = json.dumps(line).encode() + b"\n"
        room = ROOM if phase in (Phase.PREFLIGHT, Phase.SEED) else 0
        with _errors(self._path, len(data) + room):
            fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)  # nobody else's line is cut off with what is torn of this one
                _append(fd, data, room, durable)
                if phase in FINAL:
                    with contextlib.suppress(OSError):
                        os.ftruncate(fd, os.fstat(fd).st_size)  # gives back what was reserved
            finally:
                os.close(fd)
        self.phase = phase


def _append(fd: int, line: bytes, room: int, durable: bool) -> None:
    """Add a line, and reserve `room` bytes for others after it; on failure the file is as long as it was."""
    start = os.fstat(fd).st_size
    if start and os.pread(fd, 1, start - 1) != b"\n":
        line = b"\n" + line  # the host lost its power in the middle of the last one
    if room:
        try:
            syscalls.fallocate(fd, start, len(line) + room)
        except OSError as error:
            if error.errno in FULL:
                raise
            # The file system reserves nothing.
    try:
        left = memoryview(line)
        while left:
            left = left[os.write(fd, left) :]
        if durable:
            os.fsync(fd)
    except BaseException:
        os.ftruncate(fd, start)
        raise


@contextlib.contextmanager
def _errors(path: Path, needed: int = 0) -> Iterator[None]:
    """What fails is said of the journal at `path`, which takes `needed` bytes more."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_space(path, needed) from None
        raise MigrateError(f"{path}: cannot be written: {error.strerror}") from None


def sync(migration: str, *, directory: Path = DIRECTORY) -> None:
    """Wait until the disk has all lines of a journal. Raises OSError; harmless when there is none."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(directory / f"{check_migration_id(migration)}.jsonl", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_directory(directory)


def load(migration: str, *, directory: Path = DIRECTORY) -> Entry | None:
    """The entry of one move, or None. A line torn by a crash does not count."""
    try:
        lines = (directory / f"{check_migration_id(migration)}.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return None
    merged: dict[str, Any] = {}
    started = ""
    for line in lines:
        try:
            merged |= json.loads(line)
        except (ValueError, TypeError):
            continue
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
