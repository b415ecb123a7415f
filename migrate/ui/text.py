"""Format sizes, durations and the report, the same for every monitor."""

from collections.abc import Sequence

from migrate.events import ModeChosen, PassDone, Planned, Report, RoundDone, Throttled


def size(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """0.0123 -> "12 ms", 3.2 -> "3.20 s"."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def precise(seconds: float) -> str:
    """0.0123 -> "12.3 ms", 3.2 -> "3.20 s"."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def age(seconds: float) -> str:
    """90 -> "1 min", 200000 -> "2 d"; never less than 0."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def rate(bytes_per_second: float) -> str:
    """1536 -> "1.5 KiB/s"."""
    return f"{size(bytes_per_second)}/s"


def progress(done: float, total: float | None, speed: float) -> str:
    """Return "1.0 MiB of 4.0 MiB, 3.0 MiB left, 1.0 MiB/s"; "" before the first byte."""
    if not done:
        return ""
    of = f" of {size(total)}, {size(max(0, total - done))} left" if total else ""
    return f"{size(done)}{of}" + (f", {rate(speed)}" if speed else "")


def mode(chosen: ModeChosen) -> str:
    """Return one line: how memory travels, and why."""
    return f"memory: {chosen.mode}, {chosen.reason}"


def throttled(event: Throttled) -> str:
    """Return one line: how much a container is slowed down."""
    return f"throttle: {event.percent} % less processor time until the freeze, because memory is written too fast"


def one_round(done: RoundDone) -> str:
    """Return one line: what a round over memory has sent, what is left, and the gap that would follow."""
    compressed = f" ({size(done.bytes_sent)} sent)" if done.bytes_sent < 0.9 * done.bytes_read else ""
    sent = f"{size(done.bytes_read)}{compressed} in {duration(done.seconds)}"
    written = f"left {size(done.left)}, written {rate(done.dirty_rate)}"
    return f"round {done.number}: {sent}, {written}, expected gap {duration(done.expected_gap)}"


def outlook(done: RoundDone) -> str:
    """Return one line: what a freeze would mean after this round."""
    rates = f"written {rate(done.dirty_rate)}, sent {rate(done.bandwidth)}"
    return f"left {size(done.left)}, {rates}, expected gap {duration(done.expected_gap)} (round {done.number})"


def one_pass(done: PassDone) -> str:
    """Return one line: what a pass over a tree has sent."""
    when = ", frozen" if done.frozen else ""
    files = f"{done.files} file{'' if done.files == 1 else 's'}"
    return f"{done.tree} pass {done.number}{when}: {files}, {size(done.bytes_sent)}, {duration(done.seconds)}"


def timeline(report: Report) -> list[str]:
    """Return the report's steps, one aligned line each."""
    width = max((len(name) for name in report.phases), default=0)
    return [f"{name:<{width}}  {duration(seconds):>8}" for name, seconds in report.phases.items()]


def summary(report: Report) -> str:
    """Return one line: what moved where, and for how long it was frozen."""
    expected = f" (expected {duration(report.expected_gap_s)})" if report.expected_gap_s is not None else ""
    return (
        f"{report.id}: {report.source} -> {report.target} in {duration(report.total_s)}, "
        f"downtime {duration(report.downtime_s)}{expected}, {size(report.bytes_sent)} sent"
    )


def plan(planned: Planned) -> list[str]:
    """Return lines: how a move would go, the parts of its gap, and what it is based on."""
    parts = {name: seconds for name, seconds in planned.parts.items() if seconds >= 0.0005}
    width = max(map(len, parts), default=0)
    learned = f"{planned.earlier_moves} earlier moves" if planned.earlier_moves else "no earlier move to learn from"
    files = f", and up to {size(planned.files)} of files if they are not there" if planned.files else ""
    rounds = f"{planned.rounds} rounds" if planned.rounds else "no rounds"
    if not planned.converges:
        rounds += " (memory is written faster than it is sent)"
    return [
        f"{planned.id} to {planned.target}: gap {duration(planned.gap_low_s)} to {duration(planned.gap_high_s)}, "
        f"{duration(planned.gap_s)} expected; total {duration(planned.total_s)}",
        f"mode {planned.mode}, {planned.reason}: {rounds}, {size(planned.bytes)} of memory{files}",
        f"measured: {size(planned.memory)} in {planned.processes} processes, written at {rate(planned.dirty_rate)}, "
        f"sent at {rate(planned.bandwidth)}, round trip {planned.round_trip_s * 1000:.1f} ms, {learned}",
        *(f"  {name:<{width}}  {duration(seconds):>8}" for name, seconds in parts.items()),
        f"largest part: {planned.dominant}; to halve it: {planned.advice}",
        *(f"not measured: {words}" for words in planned.unmeasured),
        "nothing was moved or changed",
    ]


def table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return lines of aligned columns under a heading."""
    every = [heading, *rows]
    widths = [max(len(row[column]) for row in every) for column in range(len(heading))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]
