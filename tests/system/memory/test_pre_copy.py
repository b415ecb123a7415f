"""Moves that send memory while the container runs: what was chosen, what is refused, and what a killed move leaves."""

import json
from typing import Any

import pytest

from tests.support.hosts import NO_MEMORY, driver
from tests.system.conftest import Lab
from tests.system.move.test_move import assert_still_here


def events(lab: Lab, *options: str, code: int = 0) -> list[dict[str, Any]]:
    """The events of a move from host1 to host2."""
    done = lab.on("host1", "pymigrate", "--json", "move", *options, "web", "host2", check=False)
    assert done.returncode == code, (done.stdout, done.stderr)
    return [json.loads(line) for line in (done.stdout or done.stderr).splitlines()]


def named(found: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [fields for fields in found if fields["event"] == event]


def test_rounds_are_reported_and_the_report_expects_the_gap(lab: Lab) -> None:
    lab.run()
    start = lab.wait_count("host1", 1)
    found = events(lab)
    (mode,), rounds, report = named(found, "mode"), named(found, "round"), found[-1]
    assert (mode["mode"], report["mode"]) == ("pre-copy", "pre-copy")
    assert [fields["number"] for fields in rounds] == list(range(1, len(rounds) + 1))
    assert len(rounds) >= 2
    assert rounds[0]["bytes_read"] >= rounds[1]["bytes_read"]
    assert rounds[-1]["expected_gap"] > 0
    lab.wait_count("host2", start)


def test_all_memory_in_the_freeze_when_that_is_asked_for(lab: Lab) -> None:
    lab.run()
    start = lab.wait_count("host1", 1)
    found = events(lab, "--mode", "stop-and-copy")
    assert (named(found, "round"), found[-1]["mode"]) == ([], "stop-and-copy")
    lab.wait_count("host2", start)


def test_a_target_without_memory_for_images_gets_all_in_the_freeze(lab: Lab) -> None:
    lab.run()
    start = lab.wait_count("host1", 1)
    program = (
        NO_MEMORY + "import sys\nfrom migrate.cli import main\nsys.exit(main(['--json', 'move', {!r}, 'web', 'host2']))"
    )
    done = lab.on("host1", lab.python, "-c", program.format("--mode=pre-copy"), check=False)
    assert done.returncode == 10
    assert "--mode stop-and-copy" in done.stdout + done.stderr
    assert_still_here(lab, start)
    done = lab.on("host1", lab.python, "-c", program.format("--mode=auto"))
    (mode,) = named([json.loads(line) for line in done.stdout.splitlines()], "mode")
    assert mode["mode"] == "stop-and-copy"
    assert "memory" in mode["reason"]
    lab.wait_count("host2", start)


def test_a_program_that_writes_too_fast_stays_if_the_user_wants_that(lab: Lab) -> None:
    lab.run()
    start = lab.wait_count("host1", 1)
    (*_, error) = events(lab, "--max-downtime", "0.001", "--on-divergence", "abort", code=10)
    assert "--max-downtime" in error["message"]
    assert_still_here(lab, start)


@pytest.mark.parametrize(
    "wrong", [("--max-downtime", "0"), ("--max-rounds", "1"), ("--mode", "teleport"), ("--on-divergence", "pray")]
)
def test_bad_options_are_refused_before_anything_is_touched(lab: Lab, wrong: tuple[str, str]) -> None:
    done = lab.on("host1", "pymigrate", "move", *wrong, "web", "host2", check=False)
    assert done.returncode == 2
    assert wrong[0] in done.stderr


@pytest.mark.parametrize("point", ["round", "last-pages"])
def test_a_move_that_is_killed_among_its_rounds_leaves_the_program_as_it_was(lab: Lab, point: str) -> None:
    lab.run()
    start = lab.wait_count("host1", 1)
    killed = driver(point, after="os.kill(os.getpid(), 9)")
    assert lab.on("host1", lab.python, "-c", killed, check=False).returncode == 137
    lab.wait_count("host1", start)
    links = lab.sh("host1", f"ls -l /proc/{lab.state('host1')['pid']}/fd")
    assert "userfaultfd" not in links
    start = lab.wait_count("host1", start)
    assert events(lab)[-1]["mode"] == "pre-copy"
    lab.wait_count("host2", start)
    numbers = lab.numbers("host2")
    assert numbers == list(range(1, len(numbers) + 1))
