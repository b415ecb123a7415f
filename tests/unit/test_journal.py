"""The phase log: order, durability against torn lines, what is read back."""

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
