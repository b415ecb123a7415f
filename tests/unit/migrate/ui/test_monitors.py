"""What each monitor shows of a move whose memory is sent in rounds."""

import io
import json
from typing import Any

import pytest
from rich.console import Console

from migrate.events import Event, Progress, Report, Reporter
from migrate.ui import text
from migrate.ui.lines import JsonLines, PlainLines
from migrate.ui.live import Live
from migrate.ui.pace import Pace

ROUND = {
    "bytes_read": 64 << 20, "bytes_sent": 48 << 20, "seconds": 0.25, "left": 2 << 20, "dirty_rate": 8.0 * (1 << 20),
    "bandwidth": 256.0 * (1 << 20), "expected_gap": 0.118,
}  # fmt: skip


class Events:
    """A monitor that keeps what it is told, of one move."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        reporter = Reporter(self, "web", "m1")
        reporter.phase("pre-copy", "memory of web")
        reporter.mode("pre-copy", "writes can be tracked")
        reporter.progress("pre-copy", 16 << 20, 64 << 20)
        figures: dict[str, Any] = ROUND
        done = reporter.round_done(1, **figures)
        reporter.warn("[host2] says [/]")
        reporter.emit(
            Report(
                "host1", "host2", "pre-copy", "TARGET", 0.121, 0.9, 50 << 20, {"pre-copy": 0.3, "dump": 0.04},
                rounds=(done,), expected_gap_s=0.118, id="web", migration="m1",
            )
        )  # fmt: skip

    def emit(self, event: Event) -> None:
        self.all.append(event)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("several", [False, True])
def test_plain_lines(several: bool) -> None:
    out = io.StringIO()
    lines = PlainLines(out, several=several)
    for event in Events().all:
        lines.emit(event)
    shown = [line[10:] for line in out.getvalue().splitlines()]
    name = "web: " if several else ""
    assert shown[:3] == [
        f"{name}pre-copy: memory of web",
        f"{name}memory: pre-copy, writes can be tracked",
        f"{name}round 1: 64.0 MiB (48.0 MiB sent) in 250 ms, left 2.0 MiB, written 8.0 MiB/s, expected gap 118 ms",
    ]
    assert shown[-1] == "web: host1 -> host2 in 900 ms, downtime 121 ms (expected 118 ms), 50.0 MiB sent"


def test_progress_has_rate_and_rest() -> None:
    [progress] = [event for event in Events().all if isinstance(event, Progress)]
    now = [10.0]
    pace = Pace(lambda: now[0])
    now[0] = 10.5
    shown = text.progress(progress.done, progress.total, pace.of(progress))
    assert shown == "16.0 MiB of 64.0 MiB, 48.0 MiB left, 32.0 MiB/s"


def test_json() -> None:
    out = io.StringIO()
    lines = JsonLines(out)
    for event in Events().all:
        lines.emit(event)
    found = {value["event"]: value for value in map(json.loads, out.getvalue().splitlines())}
    assert ROUND.items() <= found["round"].items()
    assert found["mode"]["reason"] == "writes can be tracked"
    assert ROUND.items() <= found["report"]["rounds"][0].items()
    assert (found["report"]["expected_gap_s"], found["report"]["downtime_s"]) == (0.118, 0.121)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_live(width: int) -> None:
    out = io.StringIO()
    live = Live(console=Console(file=out, force_terminal=True, width=width))
    events = Events().all
    for event in events[:-1]:
        live.emit(event)
    live._screen.refresh()
    drawn = out.getvalue()
    assert "left 2.0 MiB, written 8.0 MiB/s" in drawn
    assert "[host2] says [/]" in drawn
    live.emit(events[-1])
    assert "(expected 118" in out.getvalue()
    live.emit(events[0])  # of the next container
    live._screen.refresh()
    live.close()
    assert out.getvalue().rpartition("\x1b[?25")[2].startswith("h"), "the cursor stays hidden"
