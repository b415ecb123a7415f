"""What predictions learn from, in the journals of earlier moves."""

from pathlib import Path

import pytest

from migrate.journal.journal import Journal
from migrate.memory.forecast import Load, Past
from migrate.phases import Phase
from migrate.source import history

_WAY = (Phase.SEED, Phase.PRE_COPY, Phase.STOP_AND_COPY, Phase.PREPARED, Phase.COMMITTED)


def one(target: str, fixed: float) -> Past:
    return Past(target, Load(1 << 24, 2, 0.0005, True, 1 << 20), fixed, 0.5, 0.12, 0.13)


def moved(directory: Path, number: int, past: Past, role: str = "source", **more: object) -> None:
    """Journal a move that has ended."""
    names = {"role": role, "id": "web", "source": "host1", "target": past.target}
    log = Journal.begin(f"20261130T{number:06d}-0123456789abcdef", directory=directory, **names)
    for phase in _WAY:
        log.record(phase, durable=False)
    log.record(Phase.RESUMED, durable=False, **(history.fields(past) | more))


def test_the_newest_moves_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_LOOK", 4)
    for number in range(15):
        moved(tmp_path, number, one("near" if number % 2 else "far", number / 10))
    found = history.past(directory=tmp_path)
    assert [(past.target, past.fixed) for past in found] == [("far", 1.4), ("near", 1.3), ("far", 1.2), ("near", 1.1)]
    assert found[0] == one("far", 1.4)


def test_what_was_not_measured_teaches_nothing(tmp_path: Path) -> None:
    moved(tmp_path, 1, one("far", 0.1), role="target")
    moved(tmp_path, 2, one("far", 0.1), figures={"fixed": "x"})
    moved(tmp_path, 3, one("far", float("nan")))
    moved(tmp_path, 4, one("far", 0.1), figures=7)
    Journal.begin(
        "20261130T000005-0123456789abcdef", directory=tmp_path, role="source", id="web", source="a", target="b"
    )
    (tmp_path / "20261130T000006-0123456789abcdef.jsonl").write_bytes(b"not a journal\n")
    (tmp_path / "else.jsonl").write_bytes(b"\n")
    assert history.past(directory=tmp_path) == []
    assert history.past(directory=tmp_path / "none") == []
