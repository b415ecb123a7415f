"""What carries a move's files is killed or stopped: the move ends, says why, and nothing goes on at the target."""

import json
import time
from typing import Any

import pytest

from tests.support.hosts import driver, in_agent
from tests.system.conftest import Lab
from tests.system.move.test_move import assert_still_here
from tests.system.move.test_trees import bind, hosts, move, start

__all__ = ["hosts"]
pytestmark = pytest.mark.system

VICTIMS = "/run/victims"
# In the middle of a transfer {action} is done, and the time is noted; the rest would take 20 s.
BODY = (
    in_agent("from migrate.target import agent\nagent.PULSE_INTERVAL = 0.4")
    + """
from migrate.source import settle
from migrate.files import rsync
from migrate.wire import peer
rsync.STALL_TIMEOUT, settle.ABORT_TIMEOUT, peer.AGENT_SILENCE = {stall}, {abort}, 2.0
run = main
main = lambda argv: run([*argv, "--volume", "/data=copy"])
def here(number, pids):
    subprocess.run(f"kill -{{number}} {{pids}}", shell=True, check=True)
def there(number, pids):
    script = "p=$(echo " + pids + "); echo $p >> {victims}; kill -" + number + " $p"
    subprocess.run(["ssh", "host2", script], check=True, stdin=subprocess.DEVNULL)
def middle(done):
    if done > 4 << 20 and not os.path.exists("{victims}.time"):
        {action}
        with open("{victims}.time", "w") as file:
            file.write(str(time.time()))
    time.sleep(0.05 if done > 4 << 20 else 0)
"""
)
HERE, SHELL = "$(pgrep -x rsync)", "$(pgrep -P $(pgrep -x rsync))"
RSYNC, AGENT = "$(pgrep -f '[r]sync --server')", "$(pgrep -f 'run/pymigrate/[a]gent')"
SSHD = f"$(ps -o ppid= {AGENT})"
VOLUME = "/srv/data"


def disturbed_move(lab: Lab, action: str, stall: float = 60.0, abort: float = 10.0) -> tuple[float, dict[str, Any]]:
    """A move that fails because of what was done: how many seconds later, and its last event.

    `stall` and `abort` are how long it waits for files to move on, and for the agent to undo the move.
    """
    program = driver(
        "progress",
        before="middle(value)",
        body=BODY.format(action=action, stall=stall, abort=abort, victims=VICTIMS),
    )
    try:
        done = lab.on("host1", lab.python, "-c", program, check=False)
        took = time.time() - float(lab.sh("host1", f"cat {VICTIMS}.time"))
        assert lab.sh("host2", "pgrep -af '[r]sync --server'", check=False) == ""
    finally:
        lab.sh("host1", f"rm -f {VICTIMS}.time")
        lab.sh("host2", f"touch {VICTIMS}; kill -CONT $(cat {VICTIMS}); rm {VICTIMS}; true", check=False)
    assert "Traceback" not in done.stderr, done.stderr
    event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, event.get("workload")) == (10, "SOURCE"), (event, done.stderr)
    return took, event


@pytest.mark.parametrize("number", ["KILL", "STOP"])
def test_the_monitor_at_the_target(lab: Lab, number: str) -> None:
    """Of a container that is about to be restored: without one it would run, and nobody would read what it writes."""
    lab.run()
    before = lab.wait_count("host1", 3)
    script = f"kill -{number} $(pgrep -f '[r]untime.monitor.main')"
    program = driver(
        "freeze",
        after=f"subprocess.run(['ssh', 'host2', {script!r}], check=True, stdin=subprocess.DEVNULL)",
        body=in_agent("from runtime.checkpoint import restore\nrestore.MONITOR_PING_TIMEOUT = 1.0"),
    )
    done = lab.on("host1", lab.python, "-c", program, check=False)
    event = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, event.get("workload")) == (10, "SOURCE"), (event, done.stderr)
    assert "the container's monitor does not answer" in event["message"]
    assert_still_here(lab, before)
    lab.on("host1", "pymigrate", "move", "web", "host2")
    lab.wait_count("host2", before)


def begin(lab: Lab) -> int:
    lab.sh("host1", f"mkdir {VOLUME}; head -c 100000000 /dev/urandom > {VOLUME}/big")
    return start(lab, bind("/data", VOLUME, "rw"))


def assert_as_before(lab: Lab, before: int) -> None:
    assert_still_here(lab, before)
    # What has come stays for the next attempt if it is much, and is known for what it is.
    left = lab.sh("host2", "ls /srv; cat /var/lib/pymigrate/trees/* 2>/dev/null", check=False)
    assert left == "" or '"whole": false, "failed": true' in left, left
    assert "rsync" not in lab.sh("host1", "ps -eo args | grep '[r]sync'", check=False)


@pytest.mark.slow
def test_one_is_killed(hosts: Lab) -> None:
    """One after the other; then the container is moved all the same."""
    before = begin(hosts)
    for action, words in {
        f'here("KILL", "{HERE}")': f"rsync of {VOLUME} was killed by SIGKILL",
        f'here("KILL", "{SHELL}")': f"rsync's remote shell for {VOLUME} was killed",
        f'there("KILL", "{RSYNC}")': "rsync at host2 was killed",
        f'there("TERM", "{RSYNC}")': "rsync at host2 exited with status 20",
        f'there("KILL", "{AGENT}")': "host2: the agent was killed",
        f'there("KILL", "{SSHD}")': "the connection was lost",
    }.items():
        took, event = disturbed_move(hosts, action)
        assert words in event["message"], (action, event)
        assert took < 15, (action, event)  # it would wait 60 s for one that hangs
        assert_as_before(hosts, before)
    move(hosts, "--volume", "/data=copy")
    hosts.wait_count("host2", before)


@pytest.mark.slow
def test_one_is_stopped(hosts: Lab) -> None:
    before = begin(hosts)
    stuck = f"rsync of {VOLUME} has not moved for 3 s: "
    for action, abort, words in (
        (f'here("STOP", "{HERE}")', 10.0, f"{stuck}rsync (process "),
        (f'here("STOP", "{SHELL}")', 10.0, f"{stuck}rsync's remote shell (process "),
        (f'there("STOP", "{RSYNC}")', 10.0, f"{stuck}rsync at host2 does nothing"),
        # Nobody is there to undo the move until another agent comes.
        (f'there("STOP", "{AGENT} {RSYNC}")', 1.0, f"{stuck}host2 does not answer"),
        (f'there("STOP", "{SSHD}")', 1.0, f"{stuck}host2 does not answer"),
    ):
        took, event = disturbed_move(hosts, action, 3.0, abort)
        assert words in event["message"], (action, event)
        assert took < 25, (action, took, event)
        assert_as_before(hosts, before)
    move(hosts, "--volume", "/data=copy")
    hosts.wait_count("host2", before)


@pytest.mark.parametrize("agent", ["lives", "killed"])
def test_a_stopped_receiver_ends_with_its_move(hosts: Lab, agent: str) -> None:
    """It is gone when the target says that the move is undone: nothing is written any more to what stays."""
    before = begin(hosts)
    kill = f'; there("KILL", "{AGENT}")' if agent == "killed" else ""
    stop = f'there("STOP", "{RSYNC}"){kill}; os.kill(os.getpid(), signal.SIGINT)'
    _, event = disturbed_move(hosts, stop)
    assert "could not be cleaned" not in str(event.get("remedy"))
    assert_as_before(hosts, before)


@pytest.mark.parametrize("known", [True, False])
def test_a_stopped_receiver_outlives_source_and_agent(hosts: Lab, known: bool) -> None:
    """Nobody is left to end it but the next move, which does so before it brings anything; by what the source knows of
    the failed one, or else by the mark that it has left at the tree."""
    before = begin(hosts)
    stop = f'there("STOP", "{RSYNC}"); there("KILL", "{AGENT}"); os.kill(os.getpid(), 9)'
    program = driver(
        "progress", before="middle(value)",
        body=BODY.format(action=stop, stall=60.0, abort=10.0, victims=VICTIMS),
    )  # fmt: skip
    assert hosts.on("host1", hosts.python, "-c", program, check=False).returncode == 137
    left = hosts.sh("host2", "pgrep -f '[r]sync --server'").split()
    assert left
    if not known:
        hosts.sh("host1", "rm /var/lib/pymigrate/migrations/*")
    move(hosts, "--volume", "/data=copy")
    assert not set(left) & set(hosts.sh("host2", "pgrep rsync", check=False).split())
    hosts.wait_count("host2", before)
    assert hosts.sh("host2", "ls -A /run/pymigrate/receiving") == ""
