"""Failures at exact points of the handover: the real `pymigrate move`, with something done at one of its points."""

import json
import textwrap
import time
from typing import Any

import pytest

from tests.support.hosts import COUNT, driver, in_agent
from tests.system.conftest import Lab
from tests.system.move.test_move import assert_soon_clean, assert_still_here

HELPERS = """
def kill_agents():
    agents = "tr '\\\\0' ' ' < $p/cmdline 2>/dev/null | grep -q 'run/pymigrate/[a]gent' && kill -9 ${p#/proc/}"
    script = "for p in /proc/[0-9]*; do " + agents + "; done; true"
    subprocess.run(["ssh", "host2", script], check=True, stdin=subprocess.DEVNULL)
def cut():
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    out_of_reach()
def out_of_reach():
    # From now on every deadline passes, however long it is, and nothing asks again by itself.
    from migrate.source import ask_later, move, settle
    from migrate.wire import ssh_config
    ask_later.start = lambda *_: False
    move.CONFIRM_TIMEOUT = 1.0
    move.RESUME_TIMEOUT = settle.RECONNECT_TIMEOUT = ssh_config.CONNECT_TIMEOUT = 1.0
"""


def driven_move(
    lab: Lab, where: str, *, before: str = "pass", after: str = "pass", body: str = ""
) -> tuple[int, dict[str, Any]]:
    """`pymigrate move web host2` with something done at one of its points: its exit status and last event."""
    program = driver(where, before=before, after=after, body=HELPERS + body)
    done = lab.on("host1", lab.python, "-c", program, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, event


def test_agent_dies_while_it_holds_the_restored_tree(lab: Lab) -> None:
    """Prepared, not committed: the source goes on."""
    lab.run()
    start = lab.wait_count("host1", 1)
    code, event = driven_move(lab, "stop-and-copy", after="kill_agents(); raise OSError('test')")
    assert (code, event["workload"]) == (10, "SOURCE"), event
    assert_still_here(lab, start)


def test_agent_dies_after_the_source_has_given_up(lab: Lab) -> None:
    """Committed: the container is restored over a new connection, from the images that the target kept."""
    lab.run()
    start = lab.wait_count("host1", 1)
    code, event = driven_move(lab, "end-source", after="kill_agents()")
    assert (code, event["event"], event["workload"]) == (0, "report", "TARGET"), event
    lab.wait_count("host2", start)
    assert lab.ids("host1") == []
    assert lab.images("host2") == []


_ALL_DYING = """
seen = []
def look(line):
    import json
    from runtime.linux import processes
    if not line.get("killed"):
        with open("/run/opencontainer/containers/web/state.json") as file:
            seen.extend(processes.container_pids(json.load(file)["pid"]))
    else:
        assert len(seen) >= 4, seen  # and usleep at times
        assert all(map(processes.is_dying, seen)), [pid for pid in seen if not processes.is_dying(pid)]
"""


def test_no_process_can_run_again_when_the_end_is_journaled(lab: Lab) -> None:
    """The target may resume the container from there on, although its processes take a while to exit here."""
    lab.run(script=f"sleep 1000 & (sleep 1000 & exec sleep 1000) & {COUNT}")
    start = lab.wait_count("host1", 1)
    code, event = driven_move(lab, "journal committed", before="look(value)", body=_ALL_DYING)
    assert (code, event["workload"]) == (0, "TARGET"), event
    lab.wait_count("host2", start)


def test_processes_that_do_not_exit_are_reported_and_the_container_runs_at_the_target(lab: Lab) -> None:
    lab.run()
    start = lab.wait_count("host1", 1)
    body = """
def stuck():
    from runtime.checkpoint import dump
    wait = dump.processes.wait_exit
    def once(pidfd, timeout):
        dump.processes.wait_exit = wait
        return False
    dump.processes.wait_exit = once
"""
    code, event = driven_move(lab, "kill", after="stuck()", body=body)
    assert code != 0
    assert (event["event"], event["workload"]) == ("error", "TARGET"), event
    assert "did not exit within" in event["message"]
    lab.wait_count("host2", start)


# The restored tree lives without CRIU, and its monitor has not killed it yet: a moment of every agent's death.
_MOMENT = """
script = '''
for p in /proc/[0-9]*; do
    case "$(tr '\\\\0' ' ' < $p/cmdline 2>/dev/null)" in
    *runtime.monitor.[m]ain*) kill -STOP ${p#/proc/}; read -r criu init < $p/task/${p#/proc/}/children ;;
    esac
done
kill -9 $criu
while [ -e /proc/$criu/exe ]; do :; done
'''
subprocess.run(["ssh", "host2", script], check=True, stdin=subprocess.DEVNULL)
kill_agents()
"""


@pytest.mark.parametrize("given_up", [False, True], ids=["held", "source-has-given-up"])
def test_agent_dies_and_its_monitor_is_slow(lab: Lab, given_up: bool) -> None:
    """A tree that nobody has let run is not taken for the container, which then has gone on at neither host."""
    lab.run()
    start = lab.wait_count("host1", 1)
    where = "end-source" if given_up else "stop-and-copy"
    after = "moment()" if given_up else "moment(); raise OSError('test')"
    moment = "def moment():\n" + textwrap.indent(_MOMENT, "    ")
    code, event = driven_move(lab, where, after=after, body=moment)
    if given_up:
        assert (code, event["workload"]) == (0, "TARGET"), event
        lab.wait_count("host2", start)
        assert lab.ids("host1") == []
    else:
        assert (code, event["workload"]) == (10, "SOURCE"), event
        assert_still_here(lab, start)


# Goes into the zipapp that is sent: the first agent dies.
AGENT_DIES = """
import os, pathlib
def die():
    if not pathlib.Path("/tmp/died").exists():
        pathlib.Path("/tmp/died").touch()
        os.kill(os.getpid(), 9)
"""
PATCHED = """
from {module} import {owner}
def dying(*args, original={owner}.{name}, **options):
    if {condition}:
        die()
    return original(*args, **options)
{owner}.{name} = dying
"""
UNLOCKS = PATCHED.format(
    module="criu_rpc.client", owner="RestoreSession", name="run_until", condition="args[1] == 'network-unlock'"
)
STARTED = PATCHED.format(module="runtime.state.store", owner="Store", name="save", condition="args[1].started")
COMMITS = """
from migrate import faults
faults.at("journal committed", before=lambda _: die())
"""


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(UNLOCKS, id="not-let-run-yet"),
        pytest.param(STARTED, id="let-run-state-lags-behind"),
        pytest.param(COMMITS, id="let-run-journal-lags-behind"),
    ],
)
def test_agent_dies_while_it_resumes(lab: Lab, where: str) -> None:
    """The container runs at the target once: what was let run there is not restored a second time."""
    lab.run()
    start = lab.wait_count("host1", 1)
    move = "import sys\nfrom migrate.cli import main\nsys.exit(main(['--json', 'move', 'web', 'host2']))"
    try:
        done = lab.on("host1", lab.python, "-c", in_agent(AGENT_DIES + where) + move, check=False)
        lab.sh("host2", "test -e /tmp/died")
    finally:
        lab.sh("host2", "rm -f /tmp/died")
    event = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, event.get("workload")) == (0, "TARGET"), (event, done.stderr)
    lab.wait_count("host2", start)
    assert lab.ids("host1") == []
    assert lab.images("host2") == []
    numbers = lab.numbers("host2")
    assert numbers == sorted(set(numbers)), "something ran twice"


def test_the_network_goes_after_the_source_has_given_up(lab: Lab) -> None:
    """In doubt: nothing runs twice, nothing is lost, and `recover` finishes the move when the network is back."""
    lab.run()
    start = lab.wait_count("host1", 1)
    try:
        code, event = driven_move(lab, "end-source", after="cut()")
        assert (code, event["workload"]) == (12, "UNKNOWN"), event
        assert "pymigrate recover web" in event["remedy"]
        assert "stopped" in lab.on("host1", "pymigrate", "list").stdout
        assert lab.on("host1", "pymigrate", "start", "web", check=False).returncode == 5
    finally:
        lab.sh("host1", "ip link set eth0 up")
    done = lab.on("host1", "pymigrate", "recover", "web")
    # Resume may still be on its way: then the agent has resumed it as soon as the network was back.
    assert done.stdout.startswith(("web: runs at host2\n", "web: was resumed at host2 at "))
    lab.wait_count("host2", start)
    assert lab.ids("host1") == []
    assert lab.phases("host1") == ["resumed"]
    again = lab.on("host1", "pymigrate", "recover", "web", check=False)
    assert (again.returncode, "no move of container web is in doubt" in again.stderr) == (4, True)


def test_coordinator_dies_when_everything_is_prepared(lab: Lab) -> None:
    """The target cannot know what was decided and keeps the images; the next move has it remove them."""
    lab.run()
    start = lab.wait_count("host1", 1)
    program = driver("stop-and-copy", after="os.kill(os.getpid(), 9)")
    assert lab.on("host1", lab.python, "-c", program, check=False).returncode == 137
    after = lab.wait_count("host1", start)
    deadline = time.monotonic() + 20
    while lab.ids("host2") and time.monotonic() < deadline:
        pass
    assert lab.images("host2") != []
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.wait_count("host2", after)
    assert lab.images("host2") == []
    assert lab.phases("host1") == ["aborted", "resumed"]
    assert lab.phases("host2") == ["aborted", "resumed"]


def test_recover_leaves_another_container_of_the_same_name_alone(lab: Lab) -> None:
    """The operator gives up waiting, deletes what is left and starts anew: that is not the one that is in doubt."""
    lab.run()
    start = lab.wait_count("host1", 1)
    try:
        assert driven_move(lab, "end-source", after="cut()")[0] == 12
    finally:
        lab.sh("host1", "ip link set eth0 up")
    lab.on("host1", "pymigrate", "delete", "--force", "web")
    lab.on("host1", "pymigrate", "run", "-d", "-b", "/var/lib/pymigrate/test/web", "web")
    before = lab.wait_count("host1", 1)
    lab.on("host1", "pymigrate", "recover", "web")
    lab.wait_count("host1", before)
    lab.wait_count("host2", start)


def test_coordinator_dies_right_after_the_point_of_no_return(lab: Lab) -> None:
    """COMMITTED is on disk, nothing else has happened: it runs on here, newer than what the target has."""
    lab.run()
    start = lab.wait_count("host1", 1)
    done = lab.on(
        "host1", lab.python, "-c", driver("end-source", before="os.kill(os.getpid(), 9)"),
        check=False,
    )  # fmt: skip
    assert done.returncode == 137
    start = lab.wait_count("host1", start + 10)
    again = lab.on("host1", "pymigrate", "move", "web", "host2", check=False)
    assert (again.returncode, "pymigrate recover web" in again.stderr) == (1, True), again.stderr
    host1 = lab.sh("host1", "hostname").strip()
    assert lab.on("host1", "pymigrate", "recover", "web").stdout == f"web: runs at {host1}\n"
    assert_still_here(lab, start)
    assert_soon_clean(lab)
    assert (lab.phases("host1"), lab.phases("host2")) == (["aborted"], ["aborted"])
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.wait_count("host2", start)


def test_recover_changes_nothing_when_it_cannot_ask(lab: Lab) -> None:
    lab.run()
    kill = driver("end-source", before="os.kill(os.getpid(), 9)")
    assert lab.on("host1", lab.python, "-c", kill, check=False).returncode == 137
    lab.sh("host1", "ip link set eth0 down")
    try:
        recover = "import sys\nfrom migrate.cli import main\n"
        recover += f"{HELPERS}out_of_reach()\nsys.exit(main(['recover', 'web']))"
        done = lab.on("host1", lab.python, "-c", recover, check=False)
    finally:
        lab.sh("host1", "ip link set eth0 up")
    assert (done.returncode, "still runs here" in done.stderr) == (12, True), done.stderr
    lab.wait_count("host1", lab.count("host1"))
    assert lab.phases("host1") == ["committed"]
    lab.on("host1", "pymigrate", "recover", "web")
    assert lab.phases("host1") == ["aborted"]


def test_coordinator_dies_after_the_source_has_given_up(lab: Lab) -> None:
    lab.run()
    start = lab.wait_count("host1", 1)
    done = lab.on(
        "host1", lab.python, "-c", driver("end-source", after="os.kill(os.getpid(), 9)"),
        check=False,
    )  # fmt: skip
    assert done.returncode == 137
    assert lab.ids("host2") in ([], ["web"])
    lab.on("host1", "pymigrate", "recover", "web")
    lab.wait_count("host2", start)
    assert lab.ids("host1") == []


def test_interrupt_while_everything_is_prepared(lab: Lab) -> None:
    """Ctrl-C a moment before the point of no return rolls back."""
    lab.run()
    start = lab.wait_count("host1", 1)
    interrupt = "os.kill(os.getpid(), signal.SIGINT)"
    code, event = driven_move(lab, "stop-and-copy", after=interrupt)
    assert (code, event["workload"]) == (10, "SOURCE"), event
    assert_soon_clean(lab)
    assert_still_here(lab, start)


def test_interrupt_while_the_target_restores(lab: Lab) -> None:
    """The answer to Restore, still on its way, must not be taken for that to Abort: the target is clean at the end."""
    lab.run()
    start = lab.wait_count("host1", 1)
    interrupt = "os.kill(os.getpid(), signal.SIGINT)"
    code, event = driven_move(lab, "ask-restore", after=interrupt)
    assert (code, event["workload"]) == (10, "SOURCE"), event
    assert_still_here(lab, start)


def test_interrupt_after_the_point_of_no_return_is_too_late(lab: Lab) -> None:
    lab.run()
    start = lab.wait_count("host1", 1)
    interrupt = "os.kill(os.getpid(), signal.SIGINT)"
    code, event = driven_move(lab, "end-source", before=interrupt, after=interrupt)
    assert (code, event["event"]) == (0, "report"), event
    lab.wait_count("host2", start)


ENDS = "until test -e /tmp/end; do i=$((i+1)); echo $i; usleep 20000; done"


@pytest.mark.parametrize("deleted", [False, True])
def test_what_has_gone_on_and_ended_is_not_resurrected(lab: Lab, deleted: bool) -> None:
    """Its coordinator was killed between the decision and the kill: what the target holds is old."""
    lab.run(script=ENDS)
    lab.wait_count("host1", 1)
    kill = driver("end-source", before="os.kill(os.getpid(), 9)")
    assert lab.on("host1", lab.python, "-c", kill, check=False).returncode == 137
    lab.wait_count("host1", lab.count("host1"))
    state = lab.state("host1")
    lab.sh("host1", f"touch /proc/{state['pid']}/root/tmp/end; tail -s 0.02 --pid={state['monitor_pid']} -f /dev/null")
    if deleted:
        lab.on("host1", "pymigrate", "delete", "web")
    host1 = lab.sh("host1", "hostname").strip()
    assert lab.on("host1", "pymigrate", "recover", "web").stdout == f"web: has exited at {host1}\n"
    assert lab.ids("host1") == ([] if deleted else ["web"])
    assert_soon_clean(lab)
    assert (lab.phases("host1"), lab.phases("host2")) == (["aborted"], ["aborted"])


def test_what_was_killed_by_its_move_is_not_taken_to_have_ended(lab: Lab) -> None:
    """Its coordinator was killed before it could say so: its monitor has seen it end frozen."""
    lab.run()
    start = lab.wait_count("host1", 1)
    kill = driver("journal committed", before="'killed' in value and os.kill(os.getpid(), 9)")
    assert lab.on("host1", lab.python, "-c", kill, check=False).returncode == 137
    lab.on("host1", "pymigrate", "recover", "web")
    lab.wait_count("host2", start)
    assert lab.ids("host1") == []
