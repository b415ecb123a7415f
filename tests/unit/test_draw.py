"""What `make test` leaves out depends on the seed alone, and a test of each kind stays."""

from pathlib import Path

import pytest

from tests.support import draw, schedule

MOVE = "tests/vm/test_move.py::test_a_bare_target_can_look_after_what_comes"
NAMES = [f"tests/vm/test_x.py::test_{number}" for number in range(20)] + [MOVE, f"{schedule.IMAGES}::test_built"]


def test_the_move_and_a_few_others_run() -> None:
    drawn = draw.drawn(NAMES, "seed")
    assert {MOVE, f"{schedule.IMAGES}::test_built"} < drawn
    assert len(drawn) == draw.NUMBER + 2
    assert draw.drawn(reversed(NAMES), "seed") == drawn
    assert set().union(*(draw.drawn(NAMES, str(number)) for number in range(100))) == set(NAMES)


def test_a_new_test_takes_the_place_of_one_at_most() -> None:
    for number in range(20):
        assert len(draw.drawn(NAMES, "seed") - draw.drawn([*NAMES, f"tests/vm/test_new.py::test_{number}"], "seed")) < 2


def test_the_move_is_there() -> None:
    """Renaming it must not end that CI always runs one."""
    for always in draw.ALWAYS:
        file, _, name = always.partition("::")
        assert f"def {name}" in Path(file).read_text()


def test_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYMIGRATE_DRAW", "chosen")
    assert draw.seed() == "chosen"
    monkeypatch.delenv("PYMIGRATE_DRAW")
    monkeypatch.setattr(draw, "_TOP", tmp_path)
    assert draw.seed() == draw.WITHOUT_GIT


def test_slow_files_begin_first_and_machines_run_last() -> None:
    here = "tests/system/lifecycle/test_runtime.py"  # its containers are this machine's
    order = [schedule.IMAGES, *schedule.LONG, here, "tests/unit/test_draw.py", "tests/vm/test_move.py"]
    assert sorted([*order[3:], *order[:3]], key=schedule.turn) == order
    assert [file for file in order if not Path(file).is_file()] == []


def test_half_of_many_cases_run() -> None:
    many = [f"tests/system/test_x.py::test_many[{number}]" for number in range(7)]
    few = [f"tests/system/test_x.py::test_few[{number}]" for number in range(3)]
    unit = [f"tests/unit/test_x.py::test_many[{number}]" for number in range(7)]
    drawn = draw.drawn([*many, *few, *unit], "seed")
    assert len(drawn & set(many)) == 4
    assert drawn - set(many) == {*few, *unit}


def test_what_may_not_run_at_the_same_time() -> None:
    """The cgroup of a container on this machine is named after its id, which tests choose alike."""
    assert schedule.share("tests/system/lifecycle/test_runtime.py") == schedule.share(
        "tests/system/preflight/test_validate.py"
    )
    assert schedule.share("tests/vm/test_move.py") == schedule.share("tests/vm/test_power.py")
    assert schedule.share(schedule.IMAGES) != schedule.share("tests/vm/test_move.py")
    assert schedule.share("tests/system/move/test_move.py") != schedule.share("tests/system/move/test_trees.py")


def test_a_third_of_the_slow_ones_run() -> None:
    slow = {f"tests/system/test_x.py::test_{number}[case]" for number in range(7)}
    other = "tests/system/test_x.py::test_other"
    assert len(draw.drawn([*slow, other], "seed", slow) & slow) == 3
    assert other in draw.drawn([*slow, other], "seed", slow)
    assert set().union(*(draw.drawn(slow, str(number), slow) for number in range(50))) == slow
