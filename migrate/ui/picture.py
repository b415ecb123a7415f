"""A move as a picture (SVG): both hosts and the container over time, the parts of the gap, and the rounds over memory.

The text comes from the source and the other host, so all of it is escaped. The picture needs nothing from outside.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from migrate.events import Report, RoundDone
from migrate.ui import text

WIDTH = 960
_LEFT, _RIGHT = 150, 24  # of the time axis
_SPAN = WIDTH - _LEFT - _RIGHT
_ROW = 22
_LETTER = 6.3  # the width of a character, about
_MOST_ROUNDS = 12
_TICKS = 8

# Which host works in a step; in any other both do.
_AT_SOURCE = frozenset({"prepare", "start criu", "dump", "commit", "source ends", "clean-up"})
_AT_TARGET = frozenset({"restore", "confirm", "resume"})
_GAP_FIRST, _GAP_LAST = "dump", "resume"

_STYLE = """
svg { background: #ffffff; font: 12px "DejaVu Sans", Verdana, sans-serif; }
text { fill: #222831; } .small { font-size: 11px; fill: #5b6470; } .head { font-size: 15px; font-weight: bold; }
.in { fill: #ffffff; font-size: 11px; } .num { text-anchor: end; } .mid { text-anchor: middle; }
.source { fill: #3b6fb6; } .target { fill: #c9711a; } .both { fill: #7a6aa8; } .runs { fill: #3f8f5f; }
.gap { fill: #d64545; } .band { fill: #f8d9d9; } .lane { fill: #f1f3f6; }
.line { stroke: #c9ced6; } .expected { stroke: #222831; stroke-dasharray: 4 3; } .left { fill: #d64545; }
"""


@dataclass(frozen=True)
class Step:
    """A step of a move: from `start` to `end`, in seconds since the beginning of the move."""

    name: str
    start: float
    end: float

    @property
    def host(self) -> str:
        return "source" if self.name in _AT_SOURCE else "target" if self.name in _AT_TARGET else "both"


def steps(report: Report) -> list[Step]:
    """Return the steps of a move, in order: each begins where the one before has ended."""
    found, at = [], 0.0
    for name, seconds in report.phases.items():
        found.append(Step(name, at, at + seconds))
        at += seconds
    return found


def gap_parts(report: Report) -> list[Step]:
    """Return the steps between the freeze and the moment when the container runs again."""
    found = steps(report)
    names = [step.name for step in found]
    if _GAP_FIRST not in names or _GAP_LAST not in names:
        return []
    return found[names.index(_GAP_FIRST) : names.index(_GAP_LAST) + 1]


def picture(report: Report) -> str:
    """Return the picture of a move that has ended well."""
    parts, top = [], 0
    for draw in (_head, _timeline, _gap, _rounds):
        lines, height = draw(report, top)
        parts += lines
        top += height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}"'
    title = f"{report.id}: {report.source} to {report.target}"
    return "\n".join(
        [f'{head} role="img">', f"<title>{_escaped(title)}</title>", f"<style>{_STYLE}</style>", *parts, "</svg>", ""]
    )


_Drawn = tuple[list[str], int]  # elements, and the height that they take


def _head(report: Report, top: int) -> _Drawn:
    expected = f" (expected {text.duration(report.expected_gap_s)})" if report.expected_gap_s is not None else ""
    figures = (
        f"gap {text.duration(report.downtime_s)}{expected}, total {text.duration(report.total_s)}, "
        f"{text.size(report.bytes_sent)} sent, memory: {report.mode}"
    )
    found = [
        _text(_short(f"{report.id}: {report.source} → {report.target}", 100), 20, top + 28, "head"),
        _text(figures, 20, top + 48, "small"),
    ]
    for number, host in enumerate(("source", "target", "both")):
        found.append(_box(WIDTH - 230 + number * 72, top + 39, 10, 10, host))
        found.append(_text(host, WIDTH - 216 + number * 72, top + 48, "small"))
    return found, 64


def _timeline(report: Report, top: int) -> _Drawn:
    """Draw a lane for each host, and one that says where the container runs."""
    axis = _Axis(0.0, max(report.total_s, 1e-6))
    parts = gap_parts(report)
    lanes = (f"{report.source} (source)", f"{report.target} (target)", report.id)
    found = []
    for number, label in enumerate(lanes):
        y = top + 4 + number * 34
        found.append(_text(_short(label, 20), _LEFT - 10, y + 16, "num"))
        found.append(_box(_LEFT, y, _SPAN, 24, "lane"))
    if parts:
        frozen, runs = parts[0].start, parts[-1].end
        found.append(_box(axis.x(frozen), top, axis.x(runs) - axis.x(frozen), 104, "band"))
    for step in steps(report):
        for number, host in enumerate(("source", "target")):
            if step.host in (host, "both"):
                words = f"{step.name}: {text.duration(step.end - step.start)}"
                found += axis.bar(step.start, step.end, top + 4 + number * 34, host, step.name, words)
    found += _round_marks(report, axis, top + 4)
    y = top + 4 + 68
    if parts:
        found += axis.bar(0.0, frozen, y, "runs", f"runs at {report.source}")
        found += axis.bar(runs, report.total_s, y, "runs", f"runs at {report.target}")
        found += axis.bar(frozen, runs, y, "gap", "", f"gap: {text.duration(runs - frozen)}")
    return found + axis.ticks(top + 108), 150


def _round_marks(report: Report, axis: "_Axis", y: float) -> Iterator[str]:
    """Yield a line at the end of each round, in the lane of the source."""
    at = next((step.start for step in steps(report) if step.name == "pre-copy"), None)
    for done in report.rounds if at is not None else ():
        at += done.seconds  # type: ignore[operator]
        yield f'<line x1="{axis.x(at):.1f}" x2="{axis.x(at):.1f}" y1="{y}" y2="{y + 24}" stroke="#ffffff"/>'


def _gap(report: Report, top: int) -> _Drawn:
    """Draw a row for each part of the gap."""
    parts = gap_parts(report)
    if not parts:
        return [], 0
    begin, length = parts[0].start, parts[-1].end - parts[0].start
    expected = report.expected_gap_s
    axis = _Axis(0.0, max(length, expected or 0.0, 1e-6) * 1.12)
    found = [_text(f"The gap, {text.duration(report.downtime_s)}", 20, top + 16, "head")]
    y = top + 28
    for step in parts:
        seconds = step.end - step.start
        found.append(_text(step.name, _LEFT - 10, y + 13, "num"))
        found += axis.bar(step.start - begin, step.end - begin, y, step.host, height=16)
        words = text.precise(seconds)
        found.append(_text(words, axis.x(step.end - begin) + 6, y + 13, "small"))
        y += _ROW
    if expected is not None:
        x = axis.x(expected)
        found.append(f'<line class="expected" x1="{x:.1f}" x2="{x:.1f}" y1="{top + 24}" y2="{y}"/>')
        found.append(_text(f"expected {text.duration(expected)}", x, top + 18, "small mid"))
    found += axis.ticks(y + 2)
    return found, y + 40 - top


def _rounds(report: Report, top: int) -> _Drawn:
    """Draw a row for each round over memory: what was sent, and what was left after it."""
    if not report.rounds:
        return [], 0
    found = [_text("Rounds over the memory of the running container", 20, top + 16, "head")]
    most = max(max(done.bytes_read, done.left) for done in report.rounds) or 1
    y = top + 30
    for done in _chosen(report.rounds):
        if done is None:
            found.append(_text("…", _LEFT - 10, y + 11, "num"))
        else:
            found.append(_text(f"round {done.number}", _LEFT - 10, y + 13, "num"))
            found.append(_box(_LEFT, y, max(1.0, 300 * done.bytes_read / most), 9, "source"))
            found.append(_box(_LEFT, y + 9, max(1.0, 300 * done.left / most), 5, "left"))
            found.append(_text(_words(done), _LEFT + 312, y + 12, "small"))
        y += _ROW
    found.append(_box(_LEFT, y + 2, 10, 10, "source"))
    found.append(_text("read", _LEFT + 14, y + 11, "small"))
    found.append(_box(_LEFT + 60, y + 2, 10, 10, "left"))
    found.append(_text("written meanwhile, so left", _LEFT + 74, y + 11, "small"))
    return found, y + 32 - top


def _chosen(rounds: tuple[RoundDone, ...]) -> list[RoundDone | None]:
    """Return the rounds to draw; None stands for those that are left out."""
    if len(rounds) <= _MOST_ROUNDS:
        return list(rounds)
    return [*rounds[:3], None, *rounds[-(_MOST_ROUNDS - 4) :]]


def _words(done: RoundDone) -> str:
    return (
        f"{text.size(done.bytes_read)} in {text.duration(done.seconds)}, {text.size(done.left)} left, "
        f"gap would be {text.duration(done.expected_gap)}"
    )


class _Axis:
    """Seconds, from `start` to `end`, across the picture."""

    def __init__(self, start: float, end: float) -> None:
        self._start, self._length = start, end - start

    def x(self, at: float) -> float:
        return _LEFT + _SPAN * min(1.0, max(0.0, (at - self._start) / self._length))

    def bar(
        self, start: float, end: float, y: float, cls: str, label: str = "", title: str = "", height: int = 24
    ) -> list[str]:
        """Return a bar; its label only if there is room for it."""
        x, width = self.x(start), max(0.5, self.x(end) - self.x(start) - 0.6)
        found = [_box(x, y, width, height, cls, title or label)]
        if label and len(label) * _LETTER + 6 < width:
            found.append(_text(label, x + width / 2, y + 16, "in mid"))
        return found

    def ticks(self, y: float) -> list[str]:
        """Return the line of the axis with round numbers."""
        found = [f'<line class="line" x1="{_LEFT}" x2="{_LEFT + _SPAN}" y1="{y}" y2="{y}"/>']
        step = _round_step(self._length / _TICKS)
        number = 0
        while (at := number * step) <= self._length * 1.0001:
            x = self.x(at)
            found.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}"/>')
            found.append(_text(self._named(at, step), x, y + 17, "small mid"))
            number += 1
        return found

    def _named(self, at: float, step: float) -> str:
        if self._length < 1 and step < 0.1:
            return f"{at * 1000:.4g} ms"
        return f"{at:.1f} s" if step < 1 else f"{at:.0f} s"


def _round_step(at_least: float) -> float:
    """Return the smallest of 1, 2, 5, 10, ... times a power of ten that is not below `at_least`."""
    power = 1e-6
    while True:
        for factor in (1, 2, 5):
            if factor * power >= at_least:
                return factor * power
        power *= 10


def _box(x: float, y: float, width: float, height: float, cls: str, title: str = "") -> str:
    inside = f"<title>{_escaped(title)}</title>" if title else ""
    size = f'width="{width:.1f}" height="{height}"'
    return f'<rect class="{cls}" x="{x:.1f}" y="{y}" {size} rx="1.5">{inside}</rect>'


def _text(words: str, x: float, y: float, cls: str = "") -> str:
    return f'<text class="{cls}" x="{x:.1f}" y="{y}">{_escaped(words)}</text>'


def _escaped(words: str) -> str:
    """Return text that may stand in XML, which control characters may not."""
    return escape("".join(char if char.isprintable() else "\ufffd" for char in words))


def _short(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1] + "…"
