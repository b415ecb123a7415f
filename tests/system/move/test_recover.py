"""`pymigrate recover` after everything that can have happened since: it believes identities, and destroys nothing."""

import json
import time
from typing import Any

import pytest

from tests.support.hosts import COUNT, driver
from tests.system.conftest import Lab
from tests.system.move.test_handover import driven_move
from tests.system.move.test_move import assert_still_here

JOURNALS = "/var/lib/pymigrate/migrations"
PATIENCE = 60.0  # seconds


def killed_move(lab: Lab, where: str, *, before: str = "pass", after: str = "pass") -> None:
    """A move whose coordinator is killed at one of its points."""
    program = driver(where, before=before, after=after)
    assert lab.on("host1", lab.python, "-c", program, check=False).returncode == 137


def recover(lab: Lab, *options: str, host: str = "host1") -> tuple[int, str, str]:
    done = lab.on(host, "pymigrate", "recover", *options, "web", check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def migrations(lab: Lab, host: str) -> list[dict[str, Any]]:
    lines = lab.on(host, "pymigrate", "--json", "migrations").stdout.splitlines()
    return [json.loads(line) for line in lines]


def wait_phases(lab: Lab, host: str, *wanted: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while (found := lab.phases(host)) != list(wanted) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found == list(wanted)


def wait_no_agent(lab: Lab, host: str = "host2") -> None:
    """The agent of a connection that was lost ends by itself."""
    deadline = time.monotonic() + PATIENCE
    while "agent-" in lab.leftovers(host):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def identity(lab: Lab, host: str) -> tuple[str, str]:
    state = lab.state(host)
    return state["id"], state["created"]


def came_back(lab: Lab) -> tuple[tuple[str, str], int]:
    """A container whose first move was never ended here, and which has come back by another; its last number."""
    lab.run()
    mine = identity(lab, "host1")
    lab.wait_count("host1", 1)
    killed_move(lab, "hand-over", after="os.kill(os.getpid(), 9)")
    lab.on("host1", "pymigrate", "delete", "web")
    before = lab.wait_count("host2", 1)
    lab.on("host2", "pymigrate", "move", "web", "host1")
    assert identity(lab, "host1") == mine
    return mine, lab.wait_count("host1", before)


def test_a_container_that_came_back_moves_again(lab: Lab) -> None:
    mine, before = came_back(lab)
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.wait_count("host2", before)
    assert identity(lab, "host2") == mine
    assert lab.phases("host1") == ["resumed", "resumed", "resumed"]


def test_recover_leaves_a_container_alone_that_came_back(lab: Lab) -> None:
    """An unrelated `web` at the target is not the one that was moved there."""
    mine, before = came_back(lab)
    lab.run("host2", script=f"echo 1000000; {COUNT}")
    stranger = identity(lab, "host2")
    code, said, complaint = recover(lab)
    assert (code, said) == (4, ""), complaint
    lab.wait_count("host1", before)
    assert (identity(lab, "host1"), identity(lab, "host2")) == (mine, stranger)
    assert {item["workload"] for item in migrations(lab, "host1")} == {"TARGET"}


@pytest.mark.parametrize("deleted", [False, True], ids=["ended", "deleted"])
def test_what_came_back_and_has_gone_since_is_not_looked_for(lab: Lab, deleted: bool) -> None:
    came_back(lab)
    lab.on("host1", "pymigrate", "kill", "web", "KILL")
    state = lab.state("host1")
    lab.sh("host1", f"tail -s 0.02 --pid={state['monitor_pid']} -f /dev/null")
    if deleted:
        lab.on("host1", "pymigrate", "delete", "web")
    code, said, _ = recover(lab)
    assert (code, said, lab.ids("host2")) == (4, "", [])
    lab.run("host1", container="other")
    lab.on("host1", "pymigrate", "move", "other", "host2")


def test_an_old_journal_proves_nothing_about_what_runs_here(lab: Lab) -> None:
    """Without the frozen tree's process in the journal, and without that of the way back, nothing is ended."""
    mine, before = came_back(lab)
    strip = (
        "import json, pathlib\n"
        f"first, second = sorted(pathlib.Path('{JOURNALS}').iterdir())\n"
        "lines = [json.loads(line) for line in first.read_text().splitlines()]\n"
        "for line in lines:\n"
        "    [line.pop(name, None) for name in ('init', 'before', 'crc', 'format')]\n"
        "first.write_text(''.join(json.dumps(line) + '\\n' for line in lines))\n"
        "second.unlink()\n"
    )
    lab.on("host1", lab.python, "-c", strip)
    code, _, complaint = recover(lab)
    assert (code, "still runs here, and host2 says" in complaint) == (12, True), complaint
    lab.wait_count("host1", before)
    assert identity(lab, "host1") == mine
    assert recover(lab, "--forget")[0] == 0
    lab.on("host1", "pymigrate", "move", "web", "host2")


def test_resumed_is_the_answer_whatever_has_happened_since(lab: Lab) -> None:
    lab.run()
    lab.wait_count("host1", 1)
    killed_move(lab, "hand-over", after="os.kill(os.getpid(), 9)")
    lab.on("host2", "pymigrate", "delete", "--force", "web")
    lab.run("host2")
    stranger = identity(lab, "host2")
    code, said, complaint = recover(lab)
    assert (code, said.startswith("web: was resumed at host2 at 20")) == (0, True), (said, complaint)
    assert (lab.ids("host1"), identity(lab, "host2")) == ([], stranger)


def given_up(lab: Lab) -> int:
    """A container that was ended at host1 and not resumed at host2, whose agent has ended; its last number."""
    lab.run()
    before = lab.wait_count("host1", 1)
    killed_move(lab, "end-source", after="os.kill(os.getpid(), 9)")
    wait_no_agent(lab)
    return before


def wait_on_disk(lab: Lab) -> None:
    """Nobody knows the outcome: the images are taken from memory to the disk."""
    deadline = time.monotonic() + PATIENCE
    while not (found := lab.images("host2")) or not found[0].startswith("/var/lib/") or len(found) > 1:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def lose_prepared(lab: Lab) -> None:
    lab.sh("host2", f'sed -i \'/"phase": "prepared"/d\' {JOURNALS}/*')
    assert lab.phases("host2") == ["stop-and-copy"]


def test_whole_images_count_when_the_line_of_prepared_is_lost(lab: Lab) -> None:
    before = given_up(lab)
    lose_prepared(lab)
    assert recover(lab)[:2] == (0, "web: runs at host2\n")
    lab.wait_count("host2", before)
    assert (lab.phases("host1"), lab.phases("host2")) == (["resumed"], ["resumed"])


@pytest.mark.slow
def test_a_question_that_fails_destroys_nothing(lab: Lab) -> None:
    """Somebody else's container has the id at the target: that one stays, and so do the images."""
    before = given_up(lab)
    lab.run("host2", script=f"echo 1000000; {COUNT}")
    stranger = identity(lab, "host2")
    code, _, complaint = recover(lab)
    assert (code, "another container here has the id web" in complaint) == (12, True), complaint
    assert identity(lab, "host2") == stranger
    lab.on("host2", "pymigrate", "delete", "--force", "web")
    wait_phases(lab, "host1", "resumed")  # by the process that goes on asking
    lab.wait_count("host2", before)


@pytest.mark.slow
def test_a_damaged_or_missing_image_is_a_lost_container(lab: Lab) -> None:
    """As a power cut leaves them."""
    given_up(lab)
    wait_on_disk(lab)
    damage = f"printf x | dd of={lab.images('host2')[0]}/core-1.img bs=1 seek=20 conv=notrunc"
    lab.sh("host2", damage)
    for reason in ("core-1.img: is damaged", "core-1.img: is missing"):
        code, said, complaint = recover(lab)
        assert (code, said) == (16, ""), complaint
        assert complaint.count("container web is lost") == 1, complaint
        assert reason in complaint
        lab.sh("host2", f"rm -f {lab.images('host2')[0]}/core-1.img")
    assert [(item["phase"], item["workload"]) for item in migrations(lab, "host1")] == [("lost", "NEITHER")]
    assert lab.images("host2") != []
    code, said, _ = recover(lab, "--forget")
    assert (code, "was killed here" in said) == (0, True), said
    assert lab.phases("host1") == ["forgotten"]
    assert recover(lab)[0] == 4


@pytest.mark.slow
def test_a_target_whose_source_is_gone(lab: Lab) -> None:
    before = given_up(lab)
    lab.sh("host1", f"rm -r {JOURNALS}")
    assert [item["workload"] for item in migrations(lab, "host2")] == ["UNKNOWN"]
    code, _, complaint = recover(lab, host="host2")
    assert (code, "--force-target web" in complaint) == (4, True), complaint
    code, said, complaint = recover(lab, "--force-target", host="host2")
    assert (code, said) == (0, "web: runs at host2\n"), complaint
    assert "warning" in complaint
    assert "there are two of it" in complaint
    lab.wait_count("host2", before)
    assert recover(lab, "--force-target", host="host2")[0] == 4


@pytest.mark.slow
def test_a_source_whose_target_is_gone_and_that_has_ended_the_container(lab: Lab) -> None:
    """It is lost, unless the target comes back after all: nobody has removed the last copy."""
    before = given_up(lab)
    code, _, complaint = recover(lab, "--force-source")
    assert (code, "host2 is not gone" in complaint) == (1, True), complaint
    lab.sh("host1", "ip link set eth0 down")
    try:
        code, _, complaint = recover(lab, "--force-source")
        assert (code, "warning" in complaint, complaint.count("is lost")) == (16, True, 1), complaint
    finally:
        lab.sh("host1", "ip link set eth0 up")
    assert lab.phases("host1") == ["lost"]
    assert [item["workload"] for item in migrations(lab, "host1")] == ["NEITHER"]
    code, said, complaint = recover(lab)
    assert (code, said) == (0, "web: runs at host2\n"), complaint
    lab.wait_count("host2", before)
    assert lab.phases("host1") == ["resumed"]


@pytest.mark.slow
def test_a_source_whose_target_is_gone_and_that_still_runs_the_container(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    killed_move(lab, "end-source", before="os.kill(os.getpid(), 9)")
    lab.sh("host1", "ip link set eth0 down")
    host1 = lab.sh("host1", "hostname").strip()
    try:
        code, said, complaint = recover(lab, "--force-source")
        assert (code, said) == (0, f"web: runs at {host1}\n"), complaint
    finally:
        lab.sh("host1", "ip link set eth0 up")
    lab.wait_count("host1", before)
    wait_phases(lab, "host2", "aborted")
    assert lab.images("host2") == []
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.wait_count("host2", before)


@pytest.mark.slow
@pytest.mark.parametrize("noticed", [True, False])
def test_a_cut_right_before_the_point_of_no_return_rolls_back(lab: Lab, noticed: bool) -> None:
    """What the target holds does not block the next move, whether or not its agent has noticed the cut."""
    lab.run()
    before = lab.wait_count("host1", 1)
    try:
        code, event = driven_move(lab, "stop-and-copy", after="cut()")
    finally:
        lab.sh("host1", "ip link set eth0 up; until ssh host2 true < /dev/null; do sleep 0.1; done")
    assert (code, event["workload"]) == (10, "SOURCE"), event
    lab.wait_count("host1", before)
    if noticed:
        wait_no_agent(lab)
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.wait_count("host2", before)


def test_a_held_tree_that_has_died_rolls_back(lab: Lab) -> None:
    """The last question before the point of no return finds out."""
    lab.run()
    before = lab.wait_count("host1", 1)
    script = "kill -9 $(sed -n 's/.*\"pid\": *\\([0-9]*\\),.*/\\1/p' /run/opencontainer/containers/web/state.json)"
    after = f"subprocess.run(['ssh', 'host2', {script!r}], check=True, stdin=subprocess.DEVNULL)"
    code, event = driven_move(lab, "stop-and-copy", after=after)
    assert (code, event["workload"]) == (10, "SOURCE"), event
    assert_still_here(lab, before)


_CUT = """
def cut_off():
    from migrate.source import move, settle
    move.RESUME_TIMEOUT = settle.RECONNECT_TIMEOUT = 1.0
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
"""


def test_the_source_goes_on_asking_by_itself(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    try:
        code, event = driven_move(lab, "end-source", after="cut_off()", body=_CUT)
        assert (code, event["workload"]) == (12, "UNKNOWN"), event
        assert [(item["phase"], item["asking"]) for item in migrations(lab, "host1")] == [("in-doubt", True)]
    finally:
        lab.sh("host1", "ip link set eth0 up")
    wait_phases(lab, "host1", "resumed")
    lab.wait_count("host2", before)
    assert lab.ids("host1") == []
    assert not migrations(lab, "host1")[0]["asking"]


def test_forget_ends_the_process_that_asks(lab: Lab) -> None:
    lab.run()
    lab.wait_count("host1", 1)
    try:
        assert driven_move(lab, "end-source", after="cut_off()", body=_CUT)[0] == 12
        assert migrations(lab, "host1")[0]["asking"]
        code, said, _ = recover(lab, "--forget")
        assert (code, "its move to host2 is closed here" in said) == (0, True), said
        assert [(item["phase"], item["asking"]) for item in migrations(lab, "host1")] == [("forgotten", False)]
        lab.sh("host1", "! pgrep -f '[m]igrate.source.ask_later'")
    finally:
        lab.sh("host1", "ip link set eth0 up")


@pytest.mark.slow
def test_recover_says_what_it_means_when_both_hosts_have_it(lab: Lab) -> None:
    """The coordinator has died before the kill, and an operator has forced the target: neither is ended."""
    lab.run()
    before = lab.wait_count("host1", 1)
    killed_move(lab, "end-source", before="os.kill(os.getpid(), 9)")
    wait_no_agent(lab)
    assert recover(lab, "--force-target", host="host2")[0] == 0
    code, _, complaint = recover(lab)
    assert (code, "still runs here, and host2 says that it was resumed there" in complaint) == (12, True), complaint
    lab.wait_count("host1", before)
    lab.wait_count("host2", before)
