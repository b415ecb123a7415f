"""Moves that are under way: other processes find, watch and cancel them, and only them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrate.journal import under_way
from migrate.journal.under_way import Mover, Watch, movers

FIRST, SECOND = "20261124T093000-0000000000000001", "20261124T093001-0000000000000002"

# Two moves, one after the other. Each reports a phase, and ends when a line comes on stdin or when it is cancelled.
_PROCESS = """
import os, sys
from pathlib import Path
from migrate.errors import Interrupted
from migrate.events import Event, Reporter
from migrate.journal import under_way
under_way.MOVING = Path(sys.argv[1])
class Quiet:
    def emit(self, event): pass
    def close(self): pass
for migration, name in zip(sys.argv[2::2], sys.argv[3::2]):
    move = under_way.UnderWay(Quiet(), migration, id=name, root="/root", target="host2")
    try:
        with move:
            Reporter(move, name, migration).phase("seed", "root file system")
            print("moves", flush=True)
            sys.stdin.readline()
            move.require_wanted()
            print("ended", flush=True)
    except Interrupted as error:
        print(error, flush=True)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(under_way, "MOVING", tmp_path)
    return tmp_path


@contextmanager
def moving(place: Path, *moves: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROCESS, str(place), *moves], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def says(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def one(container: str | None = None) -> Mover:
    [mover] = movers("/root", container)
    return mover


def test_a_move_is_found_while_it_lasts(place: Path) -> None:
    with moving(place, FIRST, "web") as process:
        assert says(process) == "moves"
        mover = one("web")
        assert (mover.migration, mover.id, mover.target, mover.pid) == (FIRST, "web", "host2", process.pid)
        assert mover.progress()["phase"]["text"] == "root file system"
        assert movers("/root", "other") == movers("/elsewhere") == []
        with Watch() as watch:
            assert not watch.wait_end(mover, 0.01)
            process.communicate("\n", timeout=10)
            assert watch.wait_end(mover, 10)
        assert movers("/root") == []
        assert os.listdir(place) == []


def test_a_request_ends_the_move_that_it_names(place: Path) -> None:
    with moving(place, FIRST, "web", SECOND, "db") as process:
        assert says(process) == "moves"
        first = one()
        first.cancel()
        assert says(process) == "cancelled by `pymigrate cancel`"
        assert says(process) == "moves"
        first.cancel()
        os.kill(process.pid, under_way.CANCEL)  # meant for the first one, late
        assert one().id == "db"
        assert process.communicate("\n", timeout=10)[0] == "ended\n"


def test_a_request_whose_signal_is_lost_still_counts(place: Path) -> None:
    with moving(place, FIRST, "web") as process:
        assert says(process) == "moves"
        with open(place / FIRST, "ab") as file:
            file.write(b"cancel\n")
        assert process.communicate("\n", timeout=10)[0] == "cancelled by `pymigrate cancel`\n"


def test_what_a_killed_process_leaves_is_not_a_move(place: Path) -> None:
    with moving(place, FIRST, "web") as process:
        assert says(process) == "moves"
        mover = one()
        with Watch() as watch:
            process.send_signal(signal.SIGKILL)
            assert watch.wait_end(mover, 10)
        process.wait(10)
        assert movers("/root") == []
        mover.cancel()
        assert sorted(os.listdir(place)) == [FIRST, f"{FIRST}.json"]
    with moving(place, SECOND, "db") as process:
        assert says(process) == "moves"
        assert sorted(os.listdir(place)) == [SECOND, f"{SECOND}.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}', "\0" * 9])
def test_a_file_that_is_not_one_is_no_move(place: Path, text: str) -> None:
    (place / FIRST).write_text(text)
    (place / "x").write_text(text)
    assert movers("/root") == []
