"""The table and the picture of the benchmark of memory."""

import itertools
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from tests.bench import picture, table

Record = dict[str, Any]


def move(way: str, number: int, gap: float, **changes: Any) -> Record:
    key = {"link": "unshaped", "memory": 1024, "dirty": 50.0, "way": way, "round": number}
    used = {"wire": 1 << 30, "cpu": [1.0, 2.0], "peak": [1 << 20, None], "bad": 0}
    return key | {"gap": gap, "after": 0.1, "total": 10 * gap, **used} | changes


def failed(way: str, number: int) -> Record:
    key = {"link": "unshaped", "memory": 1024, "dirty": 50.0, "way": way, "round": number}
    return key | {"error": "runc: exit status 1"}


MOVES = [
    move("ours", 0, 0.2), move("two", 0, 4.0), move("one", 0, 2.0),
    move("ours", 1, 0.3), move("two", 1, 10.0), failed("one", 1),
    move("ours", 2, 0.9, bad=3), move("two", 2, 5.0), move("one", 2, 3.0),
]  # fmt: skip
MACHINE = {"processor": "2 x A & B <C>", "kernel": "6.18"}
RESULT = {"machine": MACHINE, "moves": MOVES, "snapshots": [], "several": [], "complete": True}


def test_a_row_has_medians_and_ratios_of_the_same_rounds() -> None:
    ours, two, one = table.rows(MOVES)
    assert (ours.way, ours.gap, ours.rounds, ours.failed, ours.bad) == ("ours", 0.3, 3, 0, 3)
    assert (two.gap, one.gap, one.rounds, one.failed) == (5.0, 2.5, 2, 1)
    # By rounds 0.05, 0.03 and 0.18; 0.1 and 0.3. The ratio of the medians would be 0.06 and 0.12.
    assert ours.ratios == pytest.approx({"two": 0.05, "one": 0.2})
    assert ours.total_ratios == pytest.approx({"two": 0.05, "one": 0.2})
    assert two.ratios == {}


def test_what_is_not_counted_does_not_spoil_the_rest() -> None:
    ours = table.rows(MOVES)[0]
    assert (ours.cpu, ours.peak) == ((1.0, 2.0), (1 << 20, None))
    assert "1 MiB / -" in table.moves_text(MOVES)


def test_ways_that_always_failed_stay_in_the_table() -> None:
    found = table.rows([move("ours", 0, 0.2), failed("two", 0)])
    assert [(row.way, row.gap, row.failed, row.ratios) for row in found] == [("ours", 0.2, 0, {}), ("two", None, 1, {})]


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "-"), (0.1432, "143 ms"), (0.9996, "1.00 s"), (2.314, "2.31 s"), (9.996, "10.0 s"), (26.04, "26.0 s")],
)
def test_durations_are_said_as_people_read_them(value: float | None, said: str) -> None:
    assert table.seconds(value) == said


def test_the_text_has_everything_that_was_measured() -> None:
    snapshots = [
        {"memory": 1024, "way": "ours", "round": 0, "runs": 0.3, "total": 0.4, "bad": 0},
        {"memory": 1024, "way": "two", "round": 0, "runs": 1.5, "total": 1.6, "bad": 0},
    ]
    several = [{"memory": 16, "count": 20, "round": 0, "seconds": 12.0, "how": "in a loop", "gaps": [0.1, 0.2, 0.4]}]
    text = table.text({**RESULT, "snapshots": snapshots, "several": several, "complete": False})
    for words in ("1 GiB, 50 MiB/s written", "0.20", "20 x 16 MiB", "600 ms", "200 ms", "failed: runc", "interrupted"):
        assert words in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3 * 2 + 3 + 2 + 1


def test_the_picture_is_well_formed_and_has_a_bar_for_each_gap() -> None:
    drawn = picture.draw(RESULT)
    svg = ElementTree.fromstring(drawn)
    name = "{http://www.w3.org/2000/svg}"
    assert svg.tag == f"{name}svg"
    bars = [rect for rect in svg.iter(f"{name}rect") if rect.get("x") == "200"]
    assert [bar.get("fill") for bar in bars] == ["#0b6e99", "#b4b4b4", "#d9b36c"]
    widths = [float(bar.get("width", "")) for bar in bars]
    assert widths[0] < widths[2] < widths[1]
    said = [text.text for text in svg.iter(f"{name}text")]
    assert "300 ms  (0.20 x)" in said
    assert any("A & B <C>" in (text or "") for text in said)
    assert all(0 <= float(text.get("x", "")) < 900 for text in svg.iter(f"{name}text"))


def test_the_scale_is_logarithmic_and_bounded() -> None:
    steps = [picture.position(10.0**power) for power in range(-2, 3)]
    assert [round(b - a, 6) for a, b in itertools.pairwise(steps)] == [round(steps[1] - steps[0], 6)] * 4
    assert picture.position(0) == steps[0]
    assert picture.position(1e6) == steps[-1]
