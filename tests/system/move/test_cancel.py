"""`pymigrate cancel`: a move that another process makes is rolled back, or the refusal is true."""

import json
import subprocess
import time
from typing import Any

import pytest

from tests.support.hosts import KILL_AGENT, driver
from tests.system.conftest import Lab

LIMIT = 2.0  # seconds
# At these points the move has a thread that waits, like one that waits for a host, a disk or CRIU.
WAITS = "print('waits', flush=True); time.sleep(60)"


def begun(lab: Lab, point: str, **options: str) -> "subprocess.Popen[str]":
    """A move that has come to a point and waits there."""
    process = lab.start("host1", lab.python, "-c", driver(point, **({"before": WAITS} | options)))
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "waits\n":
        assert line, process.communicate()
    return process


def end(process: "subprocess.Popen[str]") -> tuple[int, dict[str, Any]]:
    output, errors = process.communicate(timeout=90)
    assert "Traceback" not in errors
    return process.returncode, json.loads(output.splitlines()[-1])


@pytest.mark.parametrize(
    "point", ["check-target", "send-ahead", "round", "criu pre-dump", "send-images", "ask-restore"]
)
def test_before_the_point_of_no_return_the_container_stays(lab: Lab, point: str) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    process = begun(lab, point)
    started = time.monotonic()
    said = lab.on("host1", "pymigrate", "cancel", "web").stdout
    assert time.monotonic() - started < LIMIT
    in_preflight = point == "check-target"
    why = "" if in_preflight else ": cancelled by `pymigrate cancel`"
    assert said == f"web: was not moved to host2, it runs here{why}\n"
    code, last = end(process)
    assert (code, last["kind"]) == ((130, "interrupted") if in_preflight else (10, "rolled-back"))
    assert last["message"].endswith("cancelled by `pymigrate cancel`")
    lab.wait_count("host1", before)
    assert lab.leftovers("host2") == ""
    assert lab.sh("host1", "ls -A /run/pymigrate/moving") == ""


def test_a_request_counts_even_if_its_signal_is_lost(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    wait = "signal.signal(signal.SIGUSR1, signal.SIG_IGN); print('waits', flush=True); sys.stdin.readline()"
    process = lab.start("host1", lab.python, "-c", driver("send-images", before=wait), stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    while process.stdout.readline() != "waits\n":
        pass
    canceller = lab.start("host1", "pymigrate", "cancel", "web")
    lab.sh("host1", "until grep -qx cancel /run/pymigrate/moving/*; do :; done")
    process.stdin.write("\n")
    process.stdin.flush()
    said, _ = canceller.communicate(timeout=60)
    assert "it runs here: cancelled by `pymigrate cancel`" in said
    assert end(process)[0] == 10
    lab.wait_count("host1", before)


def test_the_container_runs_at_once_even_if_the_target_does_not_answer(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    process = begun(lab, "send-images")
    agent = KILL_AGENT.removeprefix("kill -9 ")
    lab.sh("host2", f"kill -STOP {agent}")
    try:
        canceller = lab.start("host1", "pymigrate", "cancel", "web")
        lab.wait_count("host1", before + 5)
        assert canceller.poll() is None
    finally:
        lab.sh("host2", f"kill -CONT {agent}")
    assert "it runs here: cancelled" in canceller.communicate(timeout=90)[0]
    assert end(process)[0] == 10
    assert lab.leftovers("host2") == ""


def test_after_the_point_of_no_return_it_is_too_late(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    wait = "print('waits', flush=True); sys.stdin.readline()"
    process = lab.start("host1", lab.python, "-c", driver("hand-over", before=wait), stdin=subprocess.PIPE)
    assert process.stdout is not None
    while process.stdout.readline() != "waits\n":
        pass
    done = lab.on("host1", "pymigrate", "cancel", "web", check=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert "the move of container web to host2 cannot be cancelled: it is past the point of no return" in done.stderr
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert end(process)[0] == 0
    lab.wait_count("host2", before)


def test_where_there_is_nothing_to_cancel(lab: Lab) -> None:
    lab.run()
    for name, words in (("web", "no move of container web is under way here"), ("x", "container does not exist: x")):
        done = lab.on("host1", "pymigrate", "cancel", name, check=False)
        assert (done.returncode, done.stdout) == (4, "")
        assert words in done.stderr.splitlines()[0]
    lab.run(container="db")
    process = begun(lab, "send-ahead")
    assert lab.on("host1", "pymigrate", "cancel", "db", check=False).returncode == 4
    assert process.poll() is None
    lab.on("host1", "pymigrate", "cancel", "web")
    assert end(process)[0] == 10
