"""The phase log of a move, kept at both ends: one JSON line a step, on disk before the step's consequence.

`/var/lib/pymigrate/migrations/<migration id>.jsonl`. The first line says who moves what where; each further line
adds what it knows. The COMMITTED line of the source is the one point of no return.

A line is written whole or not at all, and has a checksum (journal/lines.py). While nothing is frozen yet, room is
reserved for the lines that are still to come: a disk that fills up during the move does not keep its end from being
noted.
"""

import contextlib
import fcntl
import os
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from migrate.disk import FULL, no_space, sync_directory
from migrate.errors import MigrateError, ProtocolError
from migrate.journal import lines as journal_lines
from migrate.model import check_migration_id
from migrate.phases import FINAL, NEXT, Phase
from runtime.linux import syscalls

DIRECTORY = Path("/var/lib/pymigrate/migrations")
ROOM = 64 << 10  # bytes for all lines that follow SEED
AGE = 30 * 86400  # seconds that the journal of a move which has ended is kept
COUNT = 1000  # journals that are kept beside those of the last day
YOUNGEST = 86400  # seconds
_PRUNED_AT_ONCE = 100


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
        with _errors(path, ROOM):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            journal.record(Phase.PREFLIGHT, format=journal_lines.FORMAT, migration=migration, **fields)
            with _errors(path):
                sync_directory(directory)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        with contextlib.suppress(OSError):
            prune(directory=directory)
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
        data = journal_lines.encode(line)
        room = ROOM if phase in (Phase.PREFLIGHT, Phase.SEED) else 0
        with _errors(self._path, len(data) + room):
            fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
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
        # The host lost its power in the middle of the last line, which nobody has relied on.
        start -= journal_lines.torn(os.pread(fd, start, 0))
        os.ftruncate(fd, start)
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


class DamagedJournal(MigrateError):
    """A journal that does not tell for certain what has become of its move.

    `entry` is what its other lines say, None when they do not say whose move it was; `line` counts from 1.
    """

    def __init__(self, path: Path, line: int, reason: str, entry: Entry | None) -> None:
        super().__init__(
            f"{path}: line {line} {reason}: it is not certain what has become of this move",
            remedy="find out where its container runs, then move this file to another directory",
        )
        self.path, self.line, self.reason, self.entry = path, line, reason, entry


def load(migration: str, *, directory: Path = DIRECTORY) -> Entry | None:
    """The entry of one move, None if there is none. Raises DamagedJournal.

    A last line that was torn by a power cut does not count, and is not damage.
    """
    path = directory / f"{check_migration_id(migration)}.jsonl"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    lines, damage = journal_lines.decode(data)
    if b"\n" not in data:
        return None  # it was torn as it began: the move had not begun
    entry = _entry(migration, lines)
    if damage:
        raise DamagedJournal(path, *damage[0], entry)
    if entry is None:
        raise DamagedJournal(path, data.count(b"\n"), "does not say, nor do those before it, whose move it was", None)
    return entry


def _entry(migration: str, lines: list[dict[str, Any]]) -> Entry | None:
    merged: dict[str, Any] = {}
    for line in lines:
        merged |= line
    try:
        return Entry(
            migration=migration,
            role=str(merged["role"]),
            id=str(merged["id"]),
            source=str(merged["source"]),
            target=str(merged["target"]),
            phase=Phase(merged["phase"]),
            started=str(lines[0].get("time")),
            updated=str(merged["time"]),
            fields=merged,
        )
    except (KeyError, ValueError):
        return None


def scan(*, directory: Path = DIRECTORY) -> Iterator[Entry | DamagedJournal]:
    """All moves this host has taken part in, oldest first, and the journals that are damaged."""
    for path in sorted(directory.glob("*.jsonl")):
        try:
            entry = load(path.stem, directory=directory)
        except ProtocolError:
            continue  # not a journal
        except DamagedJournal as damaged:
            yield damaged
        else:
            if entry is not None:
                yield entry


def entries(*, directory: Path = DIRECTORY) -> Iterator[Entry]:
    """All moves this host has taken part in, oldest first, without those whose journals are damaged (`scan`)."""
    return (found for found in scan(directory=directory) if isinstance(found, Entry))


def require_whole(container_id: str, *, directory: Path = DIRECTORY) -> None:
    """Raise DamagedJournal when a damaged one may be of a move of this container out of this host without an end."""
    for found in scan(directory=directory):
        if isinstance(found, DamagedJournal):
            entry = found.entry
            mine = entry is not None and (entry.id, entry.role) == (container_id, "source")
            if entry is None or (mine and entry.phase not in FINAL):
                raise found


def prune(*, directory: Path = DIRECTORY) -> None:
    """Remove journals of moves that have ended: those of more than AGE, and the oldest when there are more than COUNT.

    Never one without an end, a damaged one, or one whose other host has still to be told; and never one of the last
    day. The work is bounded: what is not looked at is looked at another time. Raises OSError.
    """
    names = sorted(name for name in os.listdir(directory) if name.endswith(".jsonl"))
    old, young = (time.strftime("%Y%m%dT%H%M%S", time.gmtime(time.time() - age)) for age in (AGE, YOUNGEST))
    surplus = len(names) - COUNT
    candidates = [name for rank, name in enumerate(names) if name < old or (rank < surplus and name < young)]
    for name in random.sample(candidates, min(len(candidates), _PRUNED_AT_ONCE)):
        path = directory / name
        with contextlib.suppress(MigrateError, FileNotFoundError, BlockingIOError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                entry = load(path.stem, directory=directory)
                if entry is not None and entry.phase in FINAL and entry.fields.get("cleaned") is not False:
                    path.unlink()
            finally:
                os.close(fd)
