"""The phase log: order, durability against torn lines, what is read back."""

import json
import resource
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrate.errors import MigrateError
from migrate.journal import journal
from migrate.journal import lines as journal_lines
from migrate.journal.journal import DamagedJournal, Journal
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


def test_a_journal_knows_its_entry(tmp_path: Path) -> None:
    """The same as a later reader finds, from the first line on."""
    migration, log = begin(tmp_path)
    assert log.entry == journal.load(migration, directory=tmp_path)
    log.record(Phase.SEED, note="x")
    with pytest.raises(MigrateError):
        log.record(Phase.COMMITTED, note="y")
    read = journal.load(migration, directory=tmp_path)
    assert read is not None
    assert log.entry == read
    assert (log.phase, log.entry.fields["note"]) == (Phase.SEED, "x")


def test_a_root_that_the_journal_does_not_say_is_that_of_the_store(tmp_path: Path) -> None:
    _, log = begin(tmp_path)
    assert log.entry.with_root("/r").root == "/r"
    log.record(Phase.SEED, root="/s")
    assert log.entry.with_root("/r").root == "/s"


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


@pytest.mark.parametrize("garbage", [b'{"phase": "nowhere"}\n', b"garbage\n", b"\0" * 40 + b"\n", b"[1]\n"])
def test_a_journal_of_garbage_is_named(tmp_path: Path, garbage: bytes) -> None:
    """It may be of any container."""
    path = tmp_path / f"{journal.new_migration_id()}.jsonl"
    path.write_bytes(garbage)
    with pytest.raises(DamagedJournal, match=rf"^{path}: line 1 "):
        journal.load(path.stem, directory=tmp_path)
    assert list(journal.entries(directory=tmp_path)) == []
    assert [type(found) for found in journal.scan(directory=tmp_path)] == [DamagedJournal]
    with pytest.raises(DamagedJournal):
        journal.require_whole("web", directory=tmp_path)


@pytest.mark.parametrize("begun", [b"", b'{"time": "2026", "ph', b"\0" * 40])
def test_a_journal_that_was_torn_as_it_began_is_none(tmp_path: Path, begun: bytes) -> None:
    path = tmp_path / f"{journal.new_migration_id()}.jsonl"
    path.write_bytes(begun)
    assert journal.load(path.stem, directory=tmp_path) is None
    assert list(journal.scan(directory=tmp_path)) == []


def _damage(path: Path, line: int, old: bytes, new: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param(b"x", b"y", "has a wrong checksum", id="a-field"),
        pytest.param(b'"crc": "', b'"crc": "0', "has no checksum", id="no-checksum"),
        pytest.param(b', "crc"', b', "crd"', "has no checksum", id="checksum-of-another-name"),
        pytest.param(b"{", b"\0", "has a wrong checksum", id="not-json"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, old: bytes, new: bytes, reason: str) -> None:
    """It is not skipped: what it said may be the end of the move. The other lines say whose move it is."""
    migration, log = begin(tmp_path)
    log.record(Phase.SEED, note="x")
    log.record(Phase.STOP_AND_COPY)
    path = tmp_path / f"{migration}.jsonl"
    _damage(path, 2, old, new)
    with pytest.raises(DamagedJournal, match=f"{path}: line 2 {reason}") as raised:
        journal.load(migration, directory=tmp_path)
    assert raised.value.entry is not None
    assert (raised.value.entry.id, raised.value.entry.phase) == ("web", Phase.STOP_AND_COPY)
    with pytest.raises(DamagedJournal):
        journal.require_whole("web", directory=tmp_path)
    journal.require_whole("other", directory=tmp_path)


def test_a_damaged_journal_of_a_move_that_has_ended_is_in_nobodys_way(tmp_path: Path) -> None:
    migration, log = begin(tmp_path)
    log.record(Phase.SEED, note="x")
    log.record(Phase.ABORTED)
    _damage(tmp_path / f"{migration}.jsonl", 2, b"x", b"y")
    journal.require_whole("web", directory=tmp_path)


def test_a_journal_of_an_unknown_format_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / f"{journal.new_migration_id()}.jsonl"
    path.write_bytes(journal_lines.encode({"format": 3, "role": "source", "phase": "preflight"}))
    with pytest.raises(DamagedJournal, match="line 1 has format 3"):
        journal.load(path.stem, directory=tmp_path)


def earlier(directory: Path, *phases: Phase) -> tuple[str, Path]:
    """A journal as it was written before lines had checksums."""
    migration = journal.new_migration_id()
    fields = {"migration": migration, "role": "source", "id": "web", "source": "host1", "target": "host2"}
    lines = [{"time": "2026-01-01T00:00:00.000+00:00", "phase": phase} | fields for phase in phases]
    path = directory / f"{migration}.jsonl"
    path.write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    return migration, path


def test_a_journal_without_checksums_is_read_and_gone_on_with(tmp_path: Path) -> None:
    migration, path = earlier(tmp_path, Phase.PREFLIGHT, Phase.SEED)
    path.write_bytes(path.read_bytes() + b'{"time": "torn\n' + b'{"time": "torn again')
    entry = journal.load(migration, directory=tmp_path)
    assert entry is not None
    assert entry.phase is Phase.SEED
    Journal.resume(entry, directory=tmp_path).record(Phase.STOP_AND_COPY, note="x")
    entry = journal.load(migration, directory=tmp_path)
    assert entry is not None
    assert entry.phase is Phase.STOP_AND_COPY
    _damage(path, 4, b"x", b"y")
    with pytest.raises(DamagedJournal, match="line 4 has a wrong checksum"):
        journal.load(migration, directory=tmp_path)


def test_no_journal_is_begun_twice_or_written_to_without_a_beginning(tmp_path: Path) -> None:
    """The id comes over the wire: the journal of another move is neither added to nor removed."""
    migration, log = begin(tmp_path)
    log.record(Phase.SEED)
    path = tmp_path / f"{migration}.jsonl"
    before = path.read_bytes()
    with pytest.raises(MigrateError, match="File exists"):
        Journal.begin(migration, directory=tmp_path, role="target", id="x", source="host1", target="host2")
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(MigrateError, match="No such file"):
        log.record(Phase.ABORTED)
    assert list(tmp_path.iterdir()) == []


def test_journals_are_pruned_by_age_and_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of moves that have ended, and nothing else; those of the last day stay however many there are."""

    def make(days: float, *phases: Phase, **fields: object) -> str:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(time.time() - days * 86400))
        monkeypatch.setattr(journal, "new_migration_id", lambda: f"{stamp}-{secrets.token_hex(8)}")
        migration, log = begin(tmp_path)
        for number, phase in enumerate(phases, 1):
            log.record(phase, **fields if number == len(phases) else {})
        return migration

    kept = [make(40), make(40, Phase.SEED), make(40, Phase.ABORTED, cleaned=False)]
    damaged = make(40, Phase.SEED, Phase.ABORTED)
    _damage(tmp_path / f"{damaged}.jsonl", 2, b"seed", b"sead")
    gone = [make(40, Phase.ABORTED), make(31, Phase.ABORTED, cleaned=True)]
    young = [make(20, Phase.ABORTED), *(make(0.5, Phase.ABORTED) for _ in range(6))]
    monkeypatch.undo()
    begin(tmp_path)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names >= {*kept, damaged, *young}
    assert not names & set(gone)
    monkeypatch.setattr(journal, "COUNT", 4)
    begin(tmp_path)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names >= {*kept, damaged, *young[1:]}
    assert young[0] not in names


def test_nothing_returns_from_committed_to_the_source() -> None:
    """From COMMITTED on no path leads to a phase in which the source has the container, but through a decision."""
    decided = {Phase.RESUMED, Phase.LOST, Phase.FORGOTTEN}
    assert NEXT[Phase.COMMITTED] == {Phase.COMMITTED, Phase.IN_DOUBT, Phase.ABORTED, *decided}
    assert NEXT[Phase.LOST] == decided
    assert all(NEXT[phase] <= {phase} for phase in FINAL)
    before = [phase for phase in Phase if Phase.ABORTED in NEXT[phase] and workload(phase) != "UNKNOWN"]
    assert {workload(phase) for phase in before} == {"SOURCE"}
    assert {workload(phase) for phase in (Phase.COMMITTED, Phase.IN_DOUBT, Phase.FORGOTTEN)} == {"UNKNOWN"}
    assert (workload(Phase.RESUMED), workload(Phase.LOST)) == ("TARGET", "NEITHER")


def test_a_target_does_not_know_what_the_source_has_decided() -> None:
    assert {workload(phase, "target") for phase in (Phase.STOP_AND_COPY, Phase.PREPARED)} == {"UNKNOWN"}
    assert {workload(phase, "target") for phase in (Phase.SEED, Phase.ABORTED)} == {"SOURCE"}
    assert workload(Phase.RESUMED, "target") == "TARGET"
