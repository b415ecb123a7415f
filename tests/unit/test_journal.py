"""The phase log: order, durability against torn lines, what is read back."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrate import journal
from migrate.errors import MigrateError
from migrate.journal import Journal
from migrate.phases import FINAL, NEXT, Phase, workload


def begin(directory: Path) -> tuple[str, Journal]:
    migration = journal.new_migration_id()
    fields = {"role": "source", "id": "web", "source": "host1", "target": "host2"}
    return migration, Journal.begin(migration, directory=directory, **fields)


def test_what_is_recorded_is_read_back(tmp_path: Path) -> None:
    migration, log = begin(tmp_path)
    log.record(Phase.SEED, note="x")
    entry = journal.load(migration, directory=tmp_path)
    assert entry is not None
    assert (entry.id, entry.source, entry.target, entry.phase) == ("web", "host1", "host2", Phase.SEED)
    assert entry.fields["note"] == "x"
    assert [found.migration for found in journal.entries(directory=tmp_path)] == [migration]
    assert next(tmp_path.iterdir()).stat().st_mode & 0o777 == 0o600


def test_a_phase_out_of_order_is_refused_and_not_written(tmp_path: Path) -> None:
    migration, log = begin(tmp_path)
    with pytest.raises(MigrateError, match="cannot go from preflight to committed"):
        log.record(Phase.COMMITTED)
    entry = journal.load(migration, directory=tmp_path)
    assert entry is not None
    assert entry.phase is Phase.PREFLIGHT


def test_a_line_torn_by_a_crash_does_not_hide_what_is_before_it(tmp_path: Path) -> None:
    migration, log = begin(tmp_path)
    log.record(Phase.SEED)
    path = tmp_path / f"{migration}.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": "2026", "phase": "stop-a')
    entry = journal.load(migration, directory=tmp_path)
    assert entry is not None
    assert entry.phase is Phase.SEED


@pytest.mark.parametrize("torn", [b'{"time": "2026", "phase": "abor', b"\0" * 40, b"\xff", b'{"note": "whole"}'])
def test_a_line_after_a_torn_one_counts(tmp_path: Path, torn: bytes) -> None:
    migration, _ = begin(tmp_path)
    path = tmp_path / f"{migration}.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    entry = journal.load(migration, directory=tmp_path)
    assert entry is not None
    Journal.resume(entry, directory=tmp_path).record(Phase.SEED, note="x")
    entry = journal.load(migration, directory=tmp_path)
    assert entry is not None
    assert (entry.phase, entry.fields["note"]) == (Phase.SEED, "x")


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """A write beyond that is short, and the next one fails (setrlimit(2); Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    migration, log = begin(tmp_path)
    log.record(Phase.SEED)
    path = tmp_path / f"{migration}.jsonl"
    before = path.read_bytes()
    with files_no_longer_than(len(before) + 20), pytest.raises(MigrateError, match=rf"{path}: cannot be written: File"):
        log.record(Phase.STOP_AND_COPY)
    assert (path.read_bytes(), log.phase) == (before, Phase.SEED)
    log.record(Phase.ABORTED)
    entry = journal.load(migration, directory=tmp_path)
    assert entry is not None
    assert entry.phase is Phase.ABORTED


def test_a_journal_that_cannot_begin_leaves_none(tmp_path: Path) -> None:
    with files_no_longer_than(20), pytest.raises(MigrateError, match="cannot be written"):
        begin(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_room_is_reserved_until_the_end(tmp_path: Path) -> None:
    migration, log = begin(tmp_path)
    path = tmp_path / f"{migration}.jsonl"
    log.record(Phase.SEED, plan="x" * journal.ROOM)
    assert path.stat().st_blocks * 512 >= 2 * journal.ROOM
    log.record(Phase.ABORTED)
    assert path.stat().st_blocks * 512 <= journal.ROOM + 8192


def test_a_journal_of_garbage_is_no_entry(tmp_path: Path) -> None:
    migration = journal.new_migration_id()
    (tmp_path / f"{migration}.jsonl").write_text('{"phase": "nowhere"}\n')
    assert journal.load(migration, directory=tmp_path) is None
    assert list(journal.entries(directory=tmp_path)) == []


def test_nothing_returns_from_committed_to_the_source() -> None:
    """From COMMITTED on no path leads to a phase in which the source has the container, but through a decision."""
    assert NEXT[Phase.COMMITTED] == {Phase.COMMITTED, Phase.RESUMED, Phase.IN_DOUBT, Phase.ABORTED}
    assert all(NEXT[phase] <= {phase} for phase in FINAL)
    before = [phase for phase in Phase if Phase.ABORTED in NEXT[phase] and workload(phase) != "UNKNOWN"]
    assert {workload(phase) for phase in before} == {"SOURCE"}
    assert {workload(phase) for phase in (Phase.COMMITTED, Phase.IN_DOUBT)} == {"UNKNOWN"}
    assert workload(Phase.RESUMED) == "TARGET"
