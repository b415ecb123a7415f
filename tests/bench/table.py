"""The table of `make bench` for memory: medians of what its runs have found, in Markdown. Pure."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.links import LINKS
from tests.bench.ways import WAYS

Record = dict[str, Any]
_OURS, *_OTHERS = (way.key for way in WAYS)
_TITLES = {way.key: way.title for way in WAYS}
_LINK_TITLES = {link.key: link.title for link in LINKS}


@dataclass(frozen=True)
class Row:
    """Medians of one way with one load over one link; seconds and bytes, None where nothing was counted.

    `ratios`: ours to each shell baseline, the gap's median over the rounds that both have; for ours only.
    """

    link: str
    memory: int
    dirty: float
    way: str
    rounds: int
    failed: int
    bad: int
    gap: float | None
    after: float | None
    total: float | None
    wire: float | None
    cpu: tuple[float | None, ...]
    peak: tuple[float | None, ...]
    ratios: dict[str, float]
    total_ratios: dict[str, float]


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of what is there, None if nothing is."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def ratios(ours: Sequence[Record], others: Sequence[Record], name: str) -> float | None:
    """Return the median of the ratios in rounds of the same number, None without such a round."""
    theirs = {record["round"]: record[name] for record in others if "error" not in record}
    return median(
        record[name] / theirs[record["round"]]
        for record in ours
        if "error" not in record and theirs.get(record["round"])
    )


def rows(moves: Sequence[Record]) -> list[Row]:
    """Return a row for each link, load and way, in the order in which they were measured."""
    found: dict[tuple[str, int, float], dict[str, list[Record]]] = {}
    for record in moves:
        load = found.setdefault((record["link"], record["memory"], record["dirty"]), {})
        load.setdefault(record["way"], []).append(record)
    return [_row(load, way, ways) for load, ways in found.items() for way in ways]


def _row(load: tuple[str, int, float], way: str, ways: dict[str, list[Record]]) -> Row:
    records = ways[way]
    good = [record for record in records if "error" not in record]

    def ratio_of(name: str) -> dict[str, float]:
        found = {other: ratios(records, ways[other], name) for other in _OTHERS if way == _OURS and other in ways}
        return {other: ratio for other, ratio in found.items() if ratio is not None}

    def both(name: str) -> tuple[float | None, ...]:
        return tuple(median(record[name][end] for record in good) for end in (0, 1))

    gap, after, total, wire = (median(record[name] for record in good) for name in ("gap", "after", "total", "wire"))
    return Row(
        *load, way, len(good), len(records) - len(good), sum(record["bad"] for record in good), gap, after, total, wire,
        both("cpu"), both("peak"), ratio_of("gap"), ratio_of("total"),
    )  # fmt: skip


def seconds(value: float | None) -> str:
    """Return a duration as people read it: 143 ms, 2.31 s, 26.0 s."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 0.9995 else f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s"


def size(value: float | None) -> str:
    """Return bytes as MiB."""
    return "-" if value is None else f"{value / 2**20:.0f} MiB"


def memory(mebibytes: int) -> str:
    """Return the size of a container as people say it."""
    return f"{mebibytes >> 10} GiB" if mebibytes >= 1024 and mebibytes % 1024 == 0 else f"{mebibytes} MiB"


def load(mebibytes: int, dirty: float) -> str:
    """Return what the program does, in words."""
    return f"{memory(mebibytes)}, {f'{dirty:g} MiB/s written' if dirty else 'idle'}"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns are aligned in plain text, too."""
    cells = [list(head), *map(list, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    drawn = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(drawn) + "\n"


def _pair(values: tuple[float | None, ...], text: Callable[[float | None], str]) -> str:
    return " / ".join(text(value) for value in values)


def moves_text(moves: Sequence[Record]) -> str:
    """Return the table of the moves."""
    head = ["link", "container", "way", "gap", "ratio", "gaps in the next 10 s", "total", "ratio", "on the wire"]
    head += ["CPU, source / target", "memory, source / target", "rounds", "bad words"]
    lines = [
        [
            _LINK_TITLES[row.link],
            load(row.memory, row.dirty),
            _TITLES[row.way],
            seconds(row.gap),
            _ratios(row.ratios),
            seconds(row.after),
            seconds(row.total),
            _ratios(row.total_ratios),
            size(row.wire),
            _pair(row.cpu, seconds),
            _pair(row.peak, size),
            f"{row.rounds}" + (f", {row.failed} failed" if row.failed else ""),
            str(row.bad),
        ]
        for row in rows(moves)
    ]
    return markdown(head, lines)


def _ratios(found: dict[str, float]) -> str:
    return " / ".join(f"{ratio:.2f}" for ratio in found.values())


def snapshots_text(snapshots: Sequence[Record]) -> str:
    """Return the table of restored snapshots."""
    lines = []
    for mebibytes in dict.fromkeys(record["memory"] for record in snapshots):
        of_size = [record for record in snapshots if record["memory"] == mebibytes]
        ways = {way: [record for record in of_size if record["way"] == way] for way in (_OURS, _OTHERS[0])}
        for way, records in ways.items():
            good = [record for record in records if "error" not in record]
            found = ratios(records, ways[_OTHERS[0]], "runs") if way == _OURS else None
            lines.append([
                memory(mebibytes), "pymigrate" if way == _OURS else "runc", seconds(median(r["runs"] for r in good)),
                "" if found is None else f"{found:.2f}", seconds(median(r["total"] for r in good)), str(len(good)),
                str(sum(r["bad"] for r in good)),
            ])  # fmt: skip
    return markdown(["snapshot", "way", "runs after", "ratio", "command", "rounds", "bad words"], lines)


def several_text(several: Sequence[Record]) -> str:
    """Return the table of several containers that were moved one after the other."""
    good = [record for record in several if "error" not in record]
    lines = [
        [
            f"{record['count']} x {memory(record['memory'])}", record["how"], seconds(record["seconds"]),
            seconds(record["seconds"] / record["count"]), seconds(median(record["gaps"])), seconds(max(record["gaps"])),
        ]
        for record in good
    ]  # fmt: skip
    return markdown(["containers", "how", "total", "each", "gap, median", "gap, longest"], lines)


def text(result: Record) -> str:
    """Return all tables of a benchmark, with the machine."""
    parts = [", ".join(f"{name}: {value}" for name, value in result["machine"].items()) + "\n"]
    for name, make in (("moves", moves_text), ("snapshots", snapshots_text), ("several", several_text)):
        if result[name]:
            parts.append(make(result[name]))
    errors = [
        record["error"] for name in ("moves", "snapshots", "several") for record in result[name] if "error" in record
    ]
    parts += [f"failed: {error}\n" for error in errors]
    if not result["complete"]:
        parts.append("interrupted: not all was measured\n")
    return "\n".join(parts)
