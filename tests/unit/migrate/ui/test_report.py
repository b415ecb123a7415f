"""The report of a move: everything quoted is escaped, nothing comes from outside, and it is written safely."""

import os
import re
import stat
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import MigrateError, RolledBack, UsageError
from migrate.events import Event, PassDone, Report, RoundDone, Warned
from migrate.ui import page
from migrate.ui.page import Recorder
from migrate.ui.picture import gap_parts, picture, steps

PHASES = {
    "preflight": 0.4, "seed": 0.1, "pre-copy": 0.3, "prepare": 0.02, "start criu": 0.01, "dump": 0.04, "images": 0.005,
    "memory": 0.002, "restore": 0.05, "confirm": 0.001, "commit": 0.0, "source ends": 0.004, "resume": 0.016,
    "clean-up": 0.004,
}  # fmt: skip
EVIL = '<script src="https://x/"></script>&\'"\x1b[31m'


class Quiet:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def rounds(count: int) -> tuple[RoundDone, ...]:
    return tuple(
        RoundDone(n, 64 << 20 >> n, 60 << 20 >> n, 0.2, 32 << 20 >> n, 1e7, 3e8, 0.1, id="web", migration="m1")
        for n in range(1, count + 1)
    )


def report(name: str = "web", count: int = 3, phases: dict[str, float] = PHASES) -> Report:
    done = PassDone("rootfs", 1, False, 1000, 3, 0.2, id=name, migration="m1")
    return Report(
        "host1", "host2", "pre-copy", "TARGET", 0.118, sum(phases.values()), 64 << 20, phases, (done,),
        "writes can be tracked", rounds(count), 0.11 if count else None, id=name, migration="m1",
    )  # fmt: skip


def recorded(*events: Event) -> Recorder:
    recorder = Recorder(Quiet())
    for event in events:
        recorder.emit(event)
    return recorder


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def attributes(tags: Tags) -> Iterator[tuple[str, str]]:
    for _, attrs in tags.tags:
        for name, value in attrs.items():
            yield name, value or ""


def test_the_gap_is_the_sum_of_its_parts() -> None:
    parts = gap_parts(report())
    assert [parts[0].name, parts[-1].name] == ["dump", "resume"]
    assert parts[-1].end - parts[0].start == pytest.approx(0.118)
    assert steps(report())[-1].end == pytest.approx(report().total_s)


@pytest.mark.parametrize("count", [0, 1, 3, 12, 13, 40])
def test_the_picture_is_whole_and_shows_every_part(count: int) -> None:
    drawn = ElementTree.fromstring(picture(report(count=count)))
    words = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"dump", "memory", "restore", "resume", "40.0 ms", "50.0 ms"} <= words
    shown = {word for word in words if word and re.fullmatch(r"round \d+", word)}
    assert shown == {f"round {n}" for n in range(1, count + 1) if count <= 12 or n <= 3 or n > count - 8}
    assert ("expected 110 ms" in words) == (count > 0)
    width, height = map(int, drawn.attrib["viewBox"].split()[2:])
    for box in drawn.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0 <= y, box.attrib
        assert x + w <= width + 1, box.attrib
        assert y + h <= height, box.attrib


@given(st.dictionaries(st.text(max_size=8), st.floats(0, 1e6), max_size=8), st.text(max_size=9))
def test_any_step_and_any_name_can_be_drawn(phases: dict[str, float], name: str) -> None:
    ElementTree.fromstring(picture(report(name, phases=phases)))


def test_the_page_quotes_and_needs_nothing_from_outside() -> None:
    recorder = recorded(report(EVIL), Warned(EVIL, id=EVIL, migration="m1"))
    recorder.failed("other", RolledBack(EVIL, remedy=EVIL))
    tags = Tags(recorder.page())
    assert "script" not in {tag for tag, _ in tags.tags}
    assert not {"src", "href", "onload"} & {name for name, _ in attributes(tags)}
    assert "url(" not in recorder.page()
    assert EVIL.rstrip("\x1b[31m")[:20] in tags.text
    policies = [attrs["content"] for tag, attrs in tags.tags if tag == "meta" and "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_a_move_that_failed_is_on_the_page() -> None:
    recorder = recorded(report())
    recorder.failed("db", RolledBack("container db was not moved", remedy="do this"))
    text = Tags(recorder.page()).text
    assert "container db was not moved" in text
    assert "do this" in text
    assert "web: host1 → host2" in text


@pytest.mark.parametrize("name", ["r.html", "r.svg"])
def test_it_replaces_a_file_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("old")
    (tmp_path / "link.html").symlink_to(path)
    page.write(page.check_place(str(path)), recorded(report()))
    assert path.read_text().startswith("<!doctype html>" if name == "r.html" else "<svg ")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    if name == "r.html":
        page.write(page.check_place(str(tmp_path / "link.html")), recorded(report("db")))
        assert "db: host1" in path.read_text()
    assert sorted(os.listdir(tmp_path)) == sorted(["link.html", name])


def test_what_cannot_be_written_is_refused_before_the_move(tmp_path: Path) -> None:
    (tmp_path / "d.html").mkdir()
    os.mkfifo(tmp_path / "f.html")
    (tmp_path / "null.html").symlink_to("/dev/null")
    for name in ("d.html", "f.html", "null.html", "x/r.html", "r.txt", "r", ""):
        with pytest.raises(UsageError):
            page.check_place(f"{tmp_path}/{name}" if name else "")
    assert os.stat("/dev/null").st_rdev


def test_without_a_move_there_is_no_picture(tmp_path: Path) -> None:
    recorder = recorded()
    recorder.failed("web", MigrateError("x"))
    with pytest.raises(UsageError):
        page.write(tmp_path / "r.svg", recorder)
    assert os.listdir(tmp_path) == []
