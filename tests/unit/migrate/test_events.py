"""Every event of a move names the container and the move."""

import io
import json

import pytest

from migrate.errors import MigrateError
from migrate.events import Event, Planned, Report, Reporter
from migrate.ui.lines import JsonLines


class Kept:
    """A monitor that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def test_an_error_names_them_as_well() -> None:
    with pytest.raises(MigrateError) as raised, Reporter(Kept(), "web", "m1").naming_errors():
        raise MigrateError("x")
    assert raised.value.move == {"id": "web", "migration": "m1"}


def test_every_event_names_container_and_move() -> None:
    kept, out = Kept(), io.StringIO()
    reporter = Reporter(kept, "web", "m1")
    reporter.phase("seed", "root file system")
    reporter.progress("seed", 7)
    reporter.warn("x")
    reporter.mode("pre-copy", "x")
    reporter.round_done(
        1, bytes_read=1, bytes_sent=1, seconds=0.1, left=0, dirty_rate=0.0, bandwidth=1.0, expected_gap=0.1
    )
    done = reporter.pass_done("rootfs", 1, frozen=False, bytes_sent=1, files=2, seconds=0.1234567)
    reporter.emit(Report("a", "b", "stop-and-copy", "TARGET", 0.1, 0.2, 3, id="web", migration="m1", passes=(done,)))
    reporter.throttled(20)
    figures = (0.1, 0.08, 0.2, 1.5, 1 << 20, 5, 2, True, 1 << 20, 1, ((0.25, 4096),), 16384.0, 1e8, 0.001, 0)
    reporter.emit(
        Planned("b", "pre-copy", "x", *figures, {"processes": 0.1}, "processes", "y", id="web", migration="m1")
    )
    lines = JsonLines(out)
    for event in kept.events:
        lines.emit(event)
    objects = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [value["event"] for value in objects] == [
        "phase",
        "progress",
        "warning",
        "mode",
        "round",
        "pass",
        "report",
        "throttle",
        "plan",
    ]
    assert {(value["id"], value["migration"]) for value in objects} == {("web", "m1")}
    assert (objects[5]["seconds"], objects[6]["passes"][0]["tree"]) == (0.123457, "rootfs")
    assert {type(event).__subclasses__() == [] for event in kept.events} == {True}
    assert {type(event) for event in kept.events} == set(Event.__subclasses__())
