"""Points at which tests interfere with a move."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import faults

TOP = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    faults._before.clear()
    faults._after.clear()


def test_actions_surround_what_a_point_surrounds() -> None:
    seen: list[object] = []
    faults.at(
        "x", before=lambda value: seen.append(("before", value)), after=lambda value: seen.append(("after", value))
    )

    @faults.point("x", 1)
    def work() -> str:
        seen.append("work")
        return "done"

    for _ in range(2):
        assert work() == "done"
    assert seen == [("before", 1), "work", ("after", 1)] * 2


def test_after_a_failure_nothing_is_done() -> None:
    faults.at("x", after=lambda _: pytest.fail("it was"))
    with pytest.raises(OSError, match="work"), faults.point("x"):
        raise OSError("work")


def test_what_an_action_raises_is_raised_at_the_point() -> None:
    def fail(_: object) -> None:
        raise OSError("test")

    faults.at("x", before=fail)
    with pytest.raises(OSError, match="test"), faults.point("x"):
        pytest.fail("it was reached")


def test_nothing_but_a_call_of_at_can_have_something_done() -> None:
    """No file, no variable of the environment, no option: the whole program does not name `at`."""
    sources = [path for package in ("criu_rpc", "runtime", "migrate") for path in (TOP / package).rglob("*.py")]
    found = [path for path in sources if re.search(r"\bfaults\.at\b|import at\b", path.read_text())]
    assert found == [TOP / "migrate/faults.py"]
    code = "import sys, migrate.source.move, migrate.target.incoming; from migrate import faults;"
    code += "sys.exit(bool(faults._before or faults._after))"
    subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True)
