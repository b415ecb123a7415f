"""`pymigrate move a b c host2`: each container moves or stays by itself, and the end says which did."""

import json
import signal
import subprocess
from typing import Any

import pytest

from tests.support.hosts import verb
from tests.system.conftest import Lab

# Counts the log-ins of a move.
LOG_INS = """
from migrate.wire import ssh
login, count = ssh.login, 0
def counted(host):
    global count
    count += 1
    print("log-in", count, file=sys.stderr)
    return login(host)
ssh.login = counted
"""
# The second container's move waits in its seed phase.
SECOND_WAITS = """
import sys, time
from migrate import faults
from migrate.cli import main
begun = []
def wait(_):
    begun.append(1)
    if len(begun) == 2:
        print("waits", flush=True)
        time.sleep(60)
faults.at("send-ahead", before=wait)
sys.exit(main(["--json", "move", "a", "b", "c", "host2"]))
"""


@pytest.fixture
def three(lab: Lab) -> dict[str, int]:
    """Containers a, b and c at host1, and how far they have counted."""
    for name in "abc":
        lab.run(container=name)
    return {name: lab.wait_count("host1", 1, name) for name in "abc"}


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def assert_at(lab: Lab, counts: dict[str, int], *, host1: str, host2: str) -> None:
    """These containers have counted on, and only there."""
    for host, names in (("host1", host1), ("host2", host2)):
        assert lab.ids(host) == sorted(names)
        for name in names:
            lab.wait_count(host, counts[name], name)


def test_all_move_over_one_connection(lab: Lab, three: dict[str, int]) -> None:
    program = "import sys" + LOG_INS + verb("--json", "move", "a", "b", "--timeout", "60", "c", "host2")
    done = lab.on("host1", lab.python, "-c", program)
    assert done.stderr == "log-in 1\n"
    found = events(done.stdout)
    assert found[-1] == {"event": "summary", "target": "host2", "moved": ["a", "b", "c"], "failed": {}, "not_tried": []}
    assert [event["id"] for event in found if event["event"] == "report"] == ["a", "b", "c"]
    assert len({event["migration"] for event in found[:-1]}) == 3
    assert_at(lab, three, host1="", host2="abc")
    lab.sh("host2", "while pgrep -f '[_]_main__.py agent$'; do :; done")  # each exits, also one started ahead


def test_one_that_cannot_move_does_not_keep_the_others(lab: Lab, three: dict[str, int]) -> None:
    lab.run("host2", "b")
    done = lab.on("host1", "pymigrate", "move", "a", "b", "c", "host2", check=False)
    assert done.returncode == 3
    assert "id-in-use" in done.stderr
    assert done.stdout.splitlines()[-2:] == ["2 of 3 containers moved to host2: a, c", "b: not moved (blocked)"]
    lab.on("host2", "pymigrate", "delete", "-f", "b")
    assert_at(lab, three, host1="b", host2="ac")


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        (("a", "x", "host2"), 4, "container does not exist: x"),
        (("a", "b", "a", "host2"), 2, "container a is named twice"),
        (("a",), 2, "required: host"),
    ],
)
def test_a_bad_name_is_found_before_anything_moves(lab: Lab, names: tuple[str, ...], code: int, words: str) -> None:
    for name in "ab":
        lab.run(container=name)
    done = lab.on("host1", "pymigrate", "move", *names, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert lab.ids("host1") == ["a", "b"]


def test_a_host_that_cannot_be_reached_is_tried_once(lab: Lab, three: dict[str, int]) -> None:
    done = lab.on("host1", "pymigrate", "--json", "move", "a", "b", "c", "nowhere", check=False)
    assert done.returncode == 7
    last = events(done.stdout)[-1]
    assert (list(last["failed"]), last["not_tried"]) == (["a"], ["b", "c"])
    assert_at(lab, three, host1="abc", host2="")


def waiting(lab: Lab) -> "subprocess.Popen[str]":
    process = lab.start("host1", lab.python, "-c", SECOND_WAITS)
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "waits\n":
        assert line, process.communicate()
    return process


def test_cancel_ends_one_move_and_no_other(lab: Lab, three: dict[str, int]) -> None:
    process = waiting(lab)
    assert "b: was not moved to host2, it runs here" in lab.on("host1", "pymigrate", "cancel", "b").stdout
    output, _ = process.communicate(timeout=90)
    last = events(output)[-1]
    assert process.returncode == 10
    assert (last["moved"], last["failed"], last["not_tried"]) == (
        ["a", "c"], {"b": {"kind": "rolled-back", "workload": "SOURCE"}}, [],
    )  # fmt: skip
    assert_at(lab, three, host1="b", host2="ac")


def test_ctrl_c_ends_all(lab: Lab, three: dict[str, int]) -> None:
    process = waiting(lab)
    process.send_signal(signal.SIGINT)  # `lab exec` passes it on
    output, _ = process.communicate(timeout=90)
    last = events(output)[-1]
    assert process.returncode == 10
    assert (last["moved"], list(last["failed"]), last["not_tried"]) == (["a"], ["b"], ["c"])
    assert_at(lab, three, host1="bc", host2="a")


def test_an_agent_that_died_while_it_waited_is_replaced(lab: Lab, three: dict[str, int]) -> None:
    """The one for b is started while a moves: kill it before its turn."""
    kill = """
from migrate import faults
def kill(_):
    session = sessions[0]
    if session._next is not None and not done:
        done.append(1)
        agent = session._next.result()
        agent._channel.close()
        agent._reader.join(10)
sessions, done = [], []
from migrate.wire import peer
began = peer.Session.__init__
def begin(self, *args):
    sessions.append(self)
    began(self, *args)
peer.Session.__init__ = begin
faults.at("hand-over", before=kill)
"""
    done = lab.on("host1", lab.python, "-c", "import sys" + kill + verb("--json", "move", "a", "b", "c", "host2"))
    assert events(done.stdout)[-1]["moved"] == ["a", "b", "c"]
    assert_at(lab, three, host1="", host2="abc")


def test_another_terminal_follows_moves_to_their_end(lab: Lab, three: dict[str, int]) -> None:
    process = waiting(lab)
    watching = lab.start("host1", "pymigrate", "--json", "migrations", "--watch")
    one = lab.start("host1", "pymigrate", "migrations", "--watch", "b")
    assert watching.stdout is not None
    first = json.loads(watching.stdout.readline())
    assert (first["event"], first["id"], first["phase"]) == ("phase", "b", "seed")
    assert one.stdout is not None
    assert one.stdout.readline().endswith("b: seed: root file system\n")
    assert "seed (under way)" in lab.on("host1", "pymigrate", "migrations", "--id", "b").stdout
    lab.on("host1", "pymigrate", "cancel", "b")
    rest, errors = watching.communicate(timeout=90)
    assert (watching.returncode, errors) == (0, "")
    ends = [event for event in events(rest) if event["event"] == "end"]
    assert [(event["id"], event["phase"], event["workload"]) for event in ends] == [
        ("b", "aborted", "SOURCE"), ("c", "resumed", "TARGET"),
    ]  # fmt: skip
    assert one.communicate(timeout=90)[0].splitlines()[-1] == (
        "b: was not moved to host2: cancelled by `pymigrate cancel`"
    )
    process.communicate(timeout=90)
    assert "under way" not in lab.on("host1", "pymigrate", "migrations").stdout
    for argv in (("--watch",), ("--watch", "a")):
        done = lab.on("host1", "pymigrate", "migrations", *argv, check=False)
        assert (done.returncode, done.stdout) == (4, "")
        assert "is under way" in done.stderr
