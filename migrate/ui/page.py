"""The report of a move, or of several, as one file: a page (HTML), or only its picture (SVG).

The page needs nothing from outside and runs no code. What it quotes is escaped.
"""

import contextlib
import dataclasses
import json
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from criu_rpc.errors import Error
from migrate.errors import UsageError
from migrate.events import Event, Monitor, Report, Warned
from migrate.ui import text
from migrate.ui.picture import gap_parts, picture

_STYLE = """
body { font: 15px/1.5 "DejaVu Sans", Verdana, sans-serif; color: #222831; background: #eef0f3; margin: 0; }
main { max-width: 1000px; margin: 0 auto; padding: 24px 16px; }
section { background: #fff; padding: 8px 20px 20px; margin-bottom: 24px; border-radius: 6px; }
h1 { font-size: 22px; } h2 { font-size: 17px; margin-top: 28px; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr + tr td { border-top: 1px solid #e3e6eb; }
.failed { color: #b02a2a; } pre { overflow-x: auto; font-size: 12px; background: #f6f7f9; padding: 10px; }
"""


@dataclass
class _Move:
    """What is known of the move of one container."""

    id: str
    warnings: list[str] = field(default_factory=list)
    report: Report | None = None
    failure: Error | None = None


class Recorder:
    """A monitor that passes events on to another, and keeps what a report of the moves needs."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._moves: dict[str, _Move] = {}

    def emit(self, event: Event) -> None:
        self._monitor.emit(event)
        move = self._of(event.id)
        if isinstance(event, Warned):
            move.warnings.append(event.message)
        elif isinstance(event, Report):
            move.report = event

    def close(self) -> None:
        self._monitor.close()

    def failed(self, container_id: str, error: Error) -> None:
        """Note the error of a container's move."""
        self._of(container_id).failure = error

    def page(self) -> str:
        """Return the page (HTML)."""
        moves = list(self._moves.values())
        title = "pymigrate: move of " + ", ".join(move.id for move in moves)
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        return "\n".join(
            [
                "<!doctype html>",
                '<html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>",
                *(_section(move) for move in moves),
                "</main></body></html>",
                "",
            ]
        )

    def picture(self) -> str:
        """Return the picture of the first move that has ended well. Raises UsageError if there is none."""
        for move in self._moves.values():
            if move.report is not None:
                return picture(move.report)
        raise UsageError("no move has ended well, so a picture cannot be drawn")

    def _of(self, container_id: str) -> _Move:
        return self._moves.setdefault(container_id, _Move(container_id))


def check_place(name: str) -> Path:
    """Return the file that a report is to be written to, with links followed. Raises UsageError if that cannot be."""
    path = Path(os.path.realpath(name))
    if not name or path.suffix not in (".html", ".svg"):
        raise UsageError(f"--report {name}: the name must end in .html or .svg")
    if not path.parent.is_dir():
        raise UsageError(f"--report {name}: {path.parent} is not a directory")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise UsageError(f"--report {name}: exists, and is not a file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--report {name}: {path.parent} cannot be written to")
    return path


def write(path: Path, recorder: Recorder) -> None:
    """Replace the file at `path`, which `check_place` has returned, by the report. Raises OSError, UsageError."""
    data = (recorder.picture() if path.suffix == ".svg" else recorder.page()).encode()
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(fd, "wb") as file:
            file.write(data)
            os.fchmod(fd, 0o644)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _section(move: _Move) -> str:
    """Return what there is to say about one container."""
    parts = ["<section>"]
    if move.report is not None:
        parts += _told(move.report)
    else:
        parts.append(f"<h1>{escape(move.id)}</h1>")
    if move.failure is not None:
        lines = [str(move.failure), *(move.failure.remedy or "").splitlines()]
        parts += [f'<p class="failed">{escape(line)}</p>' for line in lines]
    if move.warnings:
        items = "".join(f"<li>{escape(message)}</li>" for message in move.warnings)
        parts.append(f"<h2>Warnings</h2><ul>{items}</ul>")
    if move.report is not None:
        plain = json.dumps(dataclasses.asdict(move.report), indent=2)
        parts.append(f"<details><summary>The report as JSON</summary><pre>{escape(plain)}</pre></details>")
    return "\n".join([*parts, "</section>"])


def _told(report: Report) -> list[str]:
    frozen = {step.name for step in gap_parts(report)}
    expected = "not predicted" if report.expected_gap_s is None else text.duration(report.expected_gap_s)
    facts = [
        ("from", report.source), ("to", report.target), ("migration", report.migration),
        ("memory", report.mode + (f": {report.mode_reason}" if report.mode_reason else "")),
        ("gap", text.duration(report.downtime_s)), ("expected gap", expected),
        ("total", text.duration(report.total_s)), ("sent", text.size(report.bytes_sent)),
    ]  # fmt: skip
    total = max(report.total_s, 1e-9)
    rows = [
        (name, text.precise(seconds), f"{100 * seconds / total:.0f} %", "frozen" if name in frozen else "")
        for name, seconds in report.phases.items()
    ]
    parts = [f"<h1>{escape(report.id)}: {escape(report.source)} → {escape(report.target)}</h1>", _table((), facts)]
    parts += ["<h2>Timeline</h2>", picture(report)]
    parts += ["<h2>Steps</h2>", _table(("step", "time", "of the total", "container"), rows, numbers=(1, 2))]
    if report.rounds:
        rounds = [
            (
                str(done.number), text.size(done.bytes_read), text.size(done.bytes_sent), text.precise(done.seconds),
                text.size(done.left), text.rate(done.dirty_rate), text.rate(done.bandwidth),
                text.precise(done.expected_gap),
            )
            for done in report.rounds
        ]  # fmt: skip
        heads = ("round", "read", "sent", "time", "left", "written at", "sent at", "gap would be")
        parts += ["<h2>Rounds over memory</h2>", _table(heads, rounds, numbers=range(8))]
    if report.passes:
        trees = [
            (done.tree, str(done.number), str(done.files), text.size(done.bytes_sent), text.precise(done.seconds),
             "frozen" if done.frozen else "")
            for done in report.passes
        ]  # fmt: skip
        columns = ("tree", "pass", "files", "sent", "time", "container")
        parts += ["<h2>Passes over files</h2>", _table(columns, trees, numbers=(1, 2, 3, 4))]
    return parts


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], numbers: range | tuple[int, ...] = ()) -> str:
    """Return a table; the columns in `numbers` are aligned to the right."""

    def row(cells: tuple[str, ...], tag: str) -> str:
        classes = [' class="n"' if column in numbers else "" for column in range(len(cells))]
        inside = (f"<{tag}{cls}>{escape(cell)}</{tag}>" for cell, cls in zip(cells, classes, strict=True))
        return f"<tr>{''.join(inside)}</tr>"

    lines = [row(heads, "th")] if heads else []
    return "<table>" + "\n".join([*lines, *(row(cells, "td") for cells in rows)]) + "</table>"
