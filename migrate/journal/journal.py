"""The phase log of a move, kept by both sides: one JSON line for each phase (phases.py says when it is on the disk).

`/var/lib/pymigrate/migrations/<migration id>.jsonl`. The first line names the container, the source and the target;
each further line adds fields.

A line is written whole or not at all, and has a checksum (journal/lines.py). Before anything is frozen, room is
reserved for the lines that are still to come, so that a disk that fills up during the move cannot keep its end from
being recorded.
"""

import contextlib
import fcntl
import os
import random
import secrets
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from migrate import disk, faults
from migrate.disk import FULL, no_space
from migrate.errors import MigrateError, ProtocolError
from migrate.journal import lines as journal_lines
from migrate.model import check_migration_id
from migrate.paths import JOURNALS as DIRECTORY
from migrate.phases import FINAL, NEXT, Phase
from runtime.light.records import Record
from runtime.linux import syscalls

ROOM = 64 << 10  # bytes for all lines that follow SEED
AGE = 30 * 86400  # seconds for which the journal of a move that has ended is kept
COUNT = 1000  # journals that are kept, besides those of the last day
YOUNGEST = 86400  # seconds
_PRUNED_AT_ONCE = 100


def new_migration_id() -> str:
    """Return an id that sorts by time and cannot be guessed: 20261124T093000-0123456789abcdef."""
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + "-" + secrets.token_hex(8)


class Entry(Record):
    """What a journal says about one move: the merged fields of its lines, and the last phase."""

    migration: str
    role: str
    id: str
    source: str
    target: str
    phase: Phase
    started: str
    updated: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, migration: str, lines: list[dict[str, Any]]) -> Self:
        """Merge the lines of a journal. Raises KeyError, ValueError when they do not say which move it was."""
        merged: dict[str, Any] = {}
        for line in lines:
            merged |= line
        return cls(
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

    def with_line(self, line: dict[str, Any]) -> Self:
        """Return the entry after one more line, which has a phase and a time."""
        fields = self.fields | line
        return self.replace(phase=Phase(line["phase"]), updated=str(line["time"]), fields=fields)

    @property
    def root(self) -> str:
        """The state directory of the container's store (`--root`). Raises KeyError: see `with_root`."""
        return str(self.fields["root"])

    def with_root(self, root: str) -> Self:
        """Return the entry with a root if it has none: journals of earlier versions do not say it."""
        return self if "root" in self.fields else self.replace(fields=self.fields | {"root": root})


class Journal:
    """Appends to one journal, and rejects a phase that must not follow the last one. `entry` is what it says so far."""

    def __init__(self, path: Path, entry: Entry) -> None:
        self._path, self.entry = path, entry

    @property
    def phase(self) -> Phase:
        return self.entry.phase

    @classmethod
    def begin(cls, migration: str, *, directory: Path = DIRECTORY, **fields: Any) -> Self:
        """Start the journal of a move at PREFLIGHT. `fields`: role, id, source, target, and what else is known.

        Raises NoSpace, MigrateError; there is then no journal.
        """
        path = directory / f"{check_migration_id(migration)}.jsonl"
        line = _line(Phase.PREFLIGHT, format=journal_lines.FORMAT, migration=migration, **fields)
        entry = Entry.of(migration, [line])
        with _errors(path, ROOM):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            _write(path, line)
            with _errors(path):
                disk.sync(directory)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        with contextlib.suppress(OSError):
            prune(directory=directory)
        return cls(path, entry)

    @classmethod
    def resume(cls, entry: Entry, *, directory: Path = DIRECTORY) -> Self:
        """Return the journal that `entry` was read from, to append to it."""
        return cls(directory / f"{check_migration_id(entry.migration)}.jsonl", entry)

    def record(self, phase: Phase, *, durable: bool = True, **fields: Any) -> None:
        """Write one line and, unless `durable` is false, wait until the disk has it.

        Raises NoSpace, MigrateError; the journal is then unchanged.
        """
        if phase not in NEXT[self.phase]:
            raise MigrateError(f"a move cannot go from {self.phase} to {phase}")
        with faults.point(f"journal {phase}", fields):
            line = _line(phase, **fields)
            _write(self._path, line, durable=durable)
            self.entry = self.entry.with_line(line)


def _line(phase: Phase, **fields: Any) -> dict[str, Any]:
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "phase": phase, **fields}


def _write(path: Path, line: dict[str, Any], *, durable: bool = True) -> None:
    """Append a line to a journal that exists. Raises NoSpace, MigrateError."""
    data = journal_lines.encode(line)
    room = ROOM if line["phase"] in (Phase.PREFLIGHT, Phase.SEED) else 0
    with _errors(path, len(data) + room):
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # so that cutting off a torn end cannot hit a line of another process
            _append(fd, data, room, durable)
            if line["phase"] in FINAL:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, os.fstat(fd).st_size)  # gives back the reserved room
        finally:
            os.close(fd)


def _append(fd: int, line: bytes, room: int, durable: bool) -> None:
    """Append a line, and reserve `room` bytes for others after it. On failure the file keeps its length."""
    start = os.fstat(fd).st_size
    if start and os.pread(fd, 1, start - 1) != b"\n":
        # The host lost power while the last line was written, so nothing has relied on that line.
        start -= journal_lines.torn(os.pread(fd, start, 0))
        os.ftruncate(fd, start)
    if room:
        try:
            syscalls.fallocate(fd, start, len(line) + room)
        except OSError as error:
            if error.errno in FULL:
                raise
            # The file system cannot reserve room.
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
    """Turn an OSError into an error that names the journal at `path`, which needs `needed` more bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_space(path, needed) from None
        raise MigrateError(f"{path}: cannot be written: {error.strerror}") from None


def sync(migration: str, *, directory: Path = DIRECTORY) -> None:
    """Wait until the disk has all lines of a journal. Harmless when there is none. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        disk.sync(directory / f"{check_migration_id(migration)}.jsonl")
        disk.sync(directory)


class DamagedJournal(MigrateError):
    """A journal that does not say for certain how its move ended.

    `entry` is what its other lines say, or None if they do not say which move it was. `line` counts from 1.
    """

    def __init__(self, path: Path, line: int, reason: str, entry: Entry | None) -> None:
        super().__init__(
            f"{path}: line {line} {reason}: it is not certain how this move ended",
            remedy="find out where its container runs, then move this file to another directory",
        )
        self.path, self.line, self.reason, self.entry = path, line, reason, entry


def load(migration: str, *, directory: Path = DIRECTORY) -> Entry | None:
    """Return the entry of one move, or None if there is none. Raises DamagedJournal.

    A last line that was torn by a power cut does not count and is not damage.
    """
    path = directory / f"{check_migration_id(migration)}.jsonl"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    lines, damage = journal_lines.decode(data)
    if b"\n" not in data:
        return None  # the first line was torn, so the move had not begun
    entry = _entry(migration, lines)
    if damage:
        raise DamagedJournal(path, *damage[0], entry)
    if entry is None:
        raise DamagedJournal(path, data.count(b"\n"), "and those before it do not say which move it was", None)
    return entry


def _entry(migration: str, lines: list[dict[str, Any]]) -> Entry | None:
    try:
        return Entry.of(migration, lines)
    except (KeyError, ValueError):
        return None


def scan(*, directory: Path = DIRECTORY) -> Iterator[Entry | DamagedJournal]:
    """Yield all moves that this host has taken part in, oldest first, and the journals that are damaged."""
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
    """Yield all moves that this host has taken part in, oldest first, except those with damaged journals (`scan`)."""
    return (found for found in scan(directory=directory) if isinstance(found, Entry))


def require_whole(container_id: str, *, directory: Path = DIRECTORY) -> None:
    """Raise DamagedJournal if one may be of an undecided move of this container out of this host."""
    for found in scan(directory=directory):
        if isinstance(found, DamagedJournal):
            entry = found.entry
            mine = entry is not None and (entry.id, entry.role) == (container_id, "source")
            if entry is None or (mine and entry.phase not in FINAL):
                raise found


def prune(*, directory: Path = DIRECTORY) -> None:
    """Remove journals of moves that have ended: those older than AGE, and the oldest if there are more than COUNT.

    Keep journals of undecided moves, damaged ones, those whose other host must still be told, and those of the last
    day. Each call looks at a bounded number of them; later calls look at the rest. Raises OSError.
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
