"""What `migrations --watch` says of a move that has ended."""

import pytest

from migrate.events import SHOWN, Event, Planned, Report
from migrate.journal.journal import Entry
from migrate.journal.under_way import Mover
from migrate.phases import Phase
from migrate.source.follow import End

MOVER = Mover("20261124T093000-0000000000000001", "web", "/root", "host2", 1, 1)


def end(phase: Phase | None) -> End:
    line = {"role": "source", "id": "web", "source": "host1", "target": "host2", "time": "t", "reason": "why"}
    return End(MOVER, Entry.of(MOVER.migration, [{**line, "phase": phase}]) if phase else None)


@pytest.mark.parametrize(
    ("phase", "words", "workload"),
    [
        (None, "web: was not moved to host2: the move had not begun", "SOURCE"),
        (Phase.RESUMED, "web: runs at host2", "TARGET"),
        (Phase.ABORTED, "web: was not moved to host2: why", "SOURCE"),
        (Phase.SEED, "web: was not moved to host2: the process that moved it was killed", "SOURCE"),
        (Phase.COMMITTED, "web: the move to host2 is committed: pymigrate recover web", "UNKNOWN"),
        (Phase.LOST, "web: the move to host2 is lost: pymigrate recover web", "NEITHER"),
    ],
)
def test_the_end_is_what_the_journal_says(phase: Phase | None, words: str, workload: str) -> None:
    assert end(phase).words() == words
    assert end(phase).plain()["workload"] == workload


def test_every_event_of_a_move_but_the_report_can_be_followed() -> None:
    assert set(SHOWN.values()) == set(Event.__subclasses__()) - {Report, Planned}
