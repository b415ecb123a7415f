"""The table of moves as a picture (SVG): a bar for each gap, on a logarithmic scale. Pure.

Beside our gap stands its ratio to the baseline that comes closest.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

from tests.bench.links import LINKS
from tests.bench.table import Record, Row, load, rows, seconds
from tests.bench.ways import WAYS

_WIDTH, _LEFT, _RIGHT = 900, 200, 130  # pixels: all, the loads' names, what stands beside a bar
_BAR, _PAD, _HEAD = 11, 7, 26  # heights: of a bar, between loads, of a link's title
_LEGEND, _LINE, _TOP = 34, 16, 92  # where the legend begins, its lines' height, where the links begin
_LEAST, _MOST = -2, 2  # the scale, as powers of ten of seconds
_COLOURS = dict(zip((way.key for way in WAYS), ("#0b6e99", "#b4b4b4", "#d9b36c"), strict=True))


def position(value: float) -> float:
    """Return where on the scale a duration lies, in pixels from the left."""
    power = math.log10(max(value, 10.0**_LEAST))
    return _LEFT + (min(power, _MOST) - _LEAST) / (_MOST - _LEAST) * (_WIDTH - _LEFT - _RIGHT)


def _text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def _bar(y: float, row: Row) -> list[str]:
    assert row.gap is not None
    width = position(row.gap) - _LEFT
    said = seconds(row.gap) + (f"  ({max(row.ratios.values()):.2f} x)" if row.ratios else "")
    return [
        f'<rect x="{_LEFT}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{_BAR - 1}" fill="{_COLOURS[row.way]}"/>',
        _text(_LEFT + width + 5, y + _BAR - 2, said, ' font-weight="bold"' if row.ratios else ""),
    ]


def draw(result: Record) -> str:
    """Return the picture of a benchmark's moves."""
    drawn: list[str] = []
    y = float(_TOP)
    found = [row for row in rows(result["moves"]) if row.gap is not None]
    titles = {link.key: link.title for link in LINKS}
    for link, of_link in groupby(found, key=lambda row: row.link):
        drawn.append(_text(12, y + 14, titles[link], ' font-size="13" font-weight="bold"'))
        y += _HEAD
        for (mebibytes, dirty), same in groupby(of_link, key=lambda row: (row.memory, row.dirty)):
            bars = list(same)
            drawn.append(_text(_LEFT - 8, y + (len(bars) * _BAR) / 2 + 4, load(mebibytes, dirty), ' text-anchor="end"'))
            for row in bars:
                drawn += _bar(y, row)
                y += _BAR
            y += _PAD
    return _frame(drawn, y, result["machine"], list(dict.fromkeys(row.way for row in found)))


def _frame(drawn: Sequence[str], bottom: float, machine: Record, ways: Sequence[str]) -> str:
    """Return the whole picture: scale, legend and machine around what is drawn."""
    around = [_text(12, 22, "How long the program stands still in a move", ' font-size="15" font-weight="bold"')]
    for number, way in enumerate(way for way in WAYS if way.key in ways):
        y = _LEGEND + number * _LINE
        around.append(f'<rect x="12" y="{y}" width="11" height="11" fill="{_COLOURS[way.key]}"/>')
        around.append(_text(28, y + 9.5, way.text))
    for power in range(_LEAST, _MOST + 1):
        at = position(10.0**power)
        around.append(f'<path d="M{at:.1f} {_TOP}V{bottom:.1f}" stroke="#ccc" stroke-width="0.6"/>')
        around.append(_text(at, bottom + 13, f"{10.0**power:g} s", ' text-anchor="middle" fill="#666"'))
    words = ", ".join(f"{name} {value}" for name, value in machine.items())
    around.append(_text(12, bottom + 32, words, ' fill="#666" font-size="9"'))
    height = bottom + 42
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="10.5" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *around, *drawn, "</svg>\n",
    ])  # fmt: skip
