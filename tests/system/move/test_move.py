"""Moves between two lab hosts: what must hold when all goes well, and when anything goes wrong."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.hosts import COUNT, NO_MEMORY, PYMIGRATE, driver, verb
from tests.system.conftest import Lab


def move(lab: Lab, *options: str, source: str = "host1", target: str = "host2") -> dict[str, Any]:
    done = lab.on(source, "pymigrate", "--json", "move", *options, "web", target)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def failing_move(lab: Lab, *options: str, host: str = "host2") -> tuple[int, dict[str, Any]]:
    """A move that must fail: its exit status and its last event."""
    done = lab.on("host1", "pymigrate", "--json", "move", *options, "web", host, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert event["event"] == "error"
    return done.returncode, event


def assert_still_here(lab: Lab, before: int) -> None:
    """The container runs at the source as if nothing had happened, and the target is clean."""
    lab.wait_count("host1", before)
    assert lab.leftovers("host2") == ""


def assert_soon_clean(lab: Lab) -> None:
    """The agent notices by itself that the source is gone; nothing tells us when it is done."""
    deadline = time.monotonic() + 60
    while (left := lab.leftovers("host2")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == ""


def test_there_and_back_nothing_is_lost(lab: Lab) -> None:
    lab.run()
    pids = lab.on("host1", "pymigrate", "exec", "web", "sh", "-c", "cat /proc/1/stat").stdout.split()[:2]
    before = lab.wait_count("host1", 3)
    assert lab.on("host1", "pymigrate", "validate", "web", "host2").stdout == "web can move to host2\n"
    assert_soon_clean(lab)
    report = move(lab)
    assert report["event"] == "report"
    assert (report["id"], report["source"], report["target"], report["workload"]) == ("web", "host1", "host2", "TARGET")
    assert 0 < report["downtime_s"] < report["total_s"]
    frozen = ("dump", "images", "memory", "files", "restore", "confirm", "commit", "source ends", "resume")
    assert sum(report["phases"].get(name, 0.0) for name in frozen) == pytest.approx(report["downtime_s"], abs=0.005)
    after = lab.wait_count("host2", before)
    assert lab.ids("host1") == []
    assert "`pymigrate migrations`" in lab.on("host1", "pymigrate", "logs", "web", check=False).stderr
    assert " host2 " in lab.on("host1", "pymigrate", "migrations", "--id", "web").stdout
    assert lab.ids("host2") == ["web"]
    assert lab.on("host2", "pymigrate", "exec", "web", "cat", "/proc/1/stat").stdout.split()[:2] == pids
    # Every number is in the log once, across both hosts: no output was lost and none came twice.
    numbers = lab.numbers("host2")
    assert numbers == list(range(1, numbers[-1] + 1))
    back = move(lab, source="host2", target="host1")
    assert back["bytes_sent"] < report["bytes_sent"], "the root file system was sent again"
    lab.wait_count("host1", after)
    assert lab.leftovers("host2").split() == ["web"], "only the bundle stays, for the next move"
    journal = [json.loads(line) for line in lab.on("host1", "pymigrate", "--json", "migrations").stdout.splitlines()]
    assert [(entry["role"], entry["phase"]) for entry in journal] == [("source", "resumed"), ("target", "resumed")]


def test_what_is_changed_in_the_bundle_later_does_not_go_along(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 3)
    bundle = "/var/lib/pymigrate/test/web"
    lab.sh("host1", f"sed -i 's/PATH=/OTHER=1\", \"PATH=/; s/pymigrate/other/' {bundle}/config.json")
    assert "OTHER=1" in lab.sh("host1", f"cat {bundle}/config.json")
    move(lab)
    lab.wait_count("host2", before)
    assert "OTHER" not in lab.on("host2", "pymigrate", "exec", "web", "env").stdout
    lab.sh("host2", "rm /var/lib/pymigrate/bundles/web/config.json")
    move(lab, source="host2", target="host1")
    assert lab.state("host1", "web")["bundle"] != bundle
    assert "OTHER" not in lab.on("host1", "pymigrate", "exec", "web", "env").stdout


def test_a_bundle_of_two_files(lab: Lab) -> None:
    lab.run(start=False)
    split = (
        "import json; from runtime.spec.two_file_split import split; "
        "config, runtime = split(json.load(open('config.json'))); "
        "json.dump(config, open('config.json', 'w')); json.dump(runtime, open('runtime.json', 'w'))"
    )
    bundle = "/var/lib/pymigrate/test/web"
    lab.sh("host1", f'cd {bundle} && {lab.python} -c "{split}"')
    lab.on("host1", "pymigrate", "run", "-d", "-b", bundle, "web")
    before = lab.wait_count("host1", 3)
    move(lab)
    before = lab.wait_count("host2", before)
    move(lab, source="host2", target="host1")
    lab.wait_count("host1", before)


def test_memory_and_tmpfs_survive(lab: Lab) -> None:
    lab.run(
        script=f"dd if=/dev/urandom of=/tmp/x bs=1M count=20 2>/dev/null; x=$(head -c 3000000 /tmp/x | base64); {COUNT}"
    )
    before = lab.wait_count("host1", 1)
    digest = lab.on("host1", "pymigrate", "exec", "web", "sha256sum", "/tmp/x").stdout
    move(lab)
    lab.wait_count("host2", before)
    assert lab.on("host2", "pymigrate", "exec", "web", "sha256sum", "/tmp/x").stdout == digest


def test_a_connection_inside_the_container_survives(lab: Lab) -> None:
    """A TCP connection over the container's loopback, data in flight both ways."""
    lab.run(script=f"while :; do nc -l -p 7000 -e cat; done & sleep 1; {{ {COUNT}; }} | nc 127.0.0.1 7000")
    before = lab.wait_count("host1", 3)
    move(lab)
    lab.wait_count("host2", before)
    numbers = lab.numbers("host2")
    assert numbers == list(range(1, numbers[-1] + 1))


def test_limits_and_own_cgroup_hold_at_the_target(lab: Lab) -> None:
    from runtime.spec.default import default_spec

    linux = default_spec()["linux"]
    linux["resources"]["pids"] = {"limit": 77}
    lab.run(linux=linux)
    before = lab.wait_count("host1", 1)
    move(lab)
    lab.wait_count("host2", before)
    assert (
        lab.sh(
            "host2",
            "cat /sys/fs/cgroup/pids/pymigrate/web/pids.max /sys/fs/cgroup/pymigrate/web/pids.max 2>/dev/null",
            check=False,
        ).strip()
        == "77"
    )
    inside = lab.on("host2", "pymigrate", "exec", "web", "cat", "/proc/1/cgroup").stdout
    assert all(line.rpartition(":")[2] == "/" for line in inside.split())


@pytest.mark.parametrize(
    ("host", "code", "words"),
    [
        ("nowhere", 7, "the name nowhere is unknown"),
        ("nobody@host2", 7, "nobody cannot log in"),
        ("10.77.0.77", 7, "cannot connect|no answer"),
        ("bad name", 2, "invalid host name"),
    ],
)
def test_unreachable_host(lab: Lab, host: str, code: int, words: str) -> None:
    lab.run()
    before = lab.count("host1") if lab.wait_count("host1", 0) else 0
    status, event = failing_move(lab, host=host)
    assert status == code
    assert re.search(words, event["message"])
    lab.wait_count("host1", before)


def test_wrong_and_missing_host_key(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    lab.sh("host1", "cp /root/.ssh/known_hosts /root/.ssh/saved; sed -i 's/^host2,.*//' /root/.ssh/known_hosts")
    try:
        status, event = failing_move(lab)
        assert (status, event["kind"]) == (7, "host")
        assert "not in known_hosts" in event["message"]
        assert "ssh host2 true" in event["remedy"]
        lab.sh("host1", "sed -n 's/^host1,[^ ]* /host2 /p' /root/.ssh/saved > /root/.ssh/known_hosts")
        status, event = failing_move(lab)
        assert status == 7
        assert "has changed" in event["message"]
        assert "ssh-keygen -R" in event["remedy"]
    finally:
        lab.sh("host1", "mv /root/.ssh/saved /root/.ssh/known_hosts")
    assert_still_here(lab, before)


@contextlib.contextmanager
def log_in_environment(lab: Lab, assignment: str) -> Iterator[None]:
    """Whoever logs in to host2 gets this variable."""
    forced = f'command="export {assignment}; eval \\"$SSH_ORIGINAL_COMMAND\\"" '
    keys = "/root/.ssh/authorized_keys"
    lab.sh("host2", f"cp {keys} {keys}.saved; while read -r k; do echo '{forced}'\"$k\"; done < {keys}.saved > {keys}")
    try:
        yield
    finally:
        lab.sh("host2", f"mv {keys}.saved {keys}")


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [("PATH=/nowhere", 8, "python3 is not installed"), ("PYMIGRATE_CRIU=/nowhere/criu", 3, "/nowhere/criu")],
    ids=["python3", "criu"],
)
def test_target_lacks_a_program(lab: Lab, environment: str, code: int, words: str) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    with log_in_environment(lab, environment):
        status, event = failing_move(lab)
    assert status == code
    assert words in json.dumps(event)
    assert_still_here(lab, before)


def _pid(lab: Lab, host: str) -> int:
    """The first process of a host, as this machine sees it."""
    argv = [*PYMIGRATE, "--json", "lab", "status"]
    rows = json.loads(subprocess.run(argv, env=lab.environment, capture_output=True, check=True).stdout)
    return next(int(row["pid"]) for row in rows if row["name"] == host)


def test_id_in_use_and_every_other_reason_at_once(lab: Lab) -> None:
    lab.run()
    lab.run("host2")
    before = lab.wait_count("host1", 1)
    lab.sh(
        "host1",
        "rmdir /var/lib/pymigrate/test/web/rootfs/tmp 2>/dev/null; pymigrate exec web sleep 60 > /dev/null 2>&1 & "
        "until pymigrate ps web | grep -q 'sleep 60'; do :; done",
    )
    status, event = failing_move(lab)
    assert (status, event["kind"]) == (3, "blocked")
    rules = [blocker["rule"] for blocker in event["blockers"]]
    assert {"exec-session", "id-in-use"} <= set(rules)
    assert all(blocker["remedy"] for blocker in event["blockers"])
    lab.wait_count("host1", before)
    assert lab.wait_count("host2", 1)


def test_target_disk_full_is_seen_before_the_freeze(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    lab.sh("host2", "mount -o remount,size=20m /var/lib/pymigrate")
    try:
        status, event = failing_move(lab)
    finally:
        lab.sh("host2", "mount -o remount,size=50% /var/lib/pymigrate")
    assert status == 3
    assert [blocker["rule"] for blocker in event["blockers"]] == ["no-space"]
    assert_still_here(lab, before)


def test_target_disk_fills_up_during_the_dump(lab: Lab) -> None:
    """The check before could not know: somebody else takes the room while the images come."""
    lab.run(
        script=f"dd if=/dev/urandom of=/tmp/x bs=1M count=30 2>/dev/null; x=$(head -c 9000000 /tmp/x | base64); {COUNT}"
    )
    before = lab.wait_count("host1", 1)
    lab.sh("host2", "mkdir -p /var/lib/pymigrate/incoming; mount -t tmpfs -o size=4m tmpfs /var/lib/pymigrate/incoming")
    try:
        # The check looks at the directory above, which still has room.
        program = NO_MEMORY + verb("--json", "move", "web", "host2")
        done = lab.on("host1", lab.python, "-c", program, check=False)
        status, event = done.returncode, json.loads(done.stdout.splitlines()[-1])
    finally:
        lab.sh("host2", "umount /var/lib/pymigrate/incoming")
    assert (status, event["workload"]) == (10, "SOURCE"), event
    assert "no room at host2 for /var/lib/pymigrate/incoming/" in event["message"], event
    assert_still_here(lab, before)


# Where a move stops by itself to have something done to it, in each phase.
HELD_AT = {
    "preflight": "check-target",
    "seed": "send-ahead",
    "stop-and-copy": "send-images",
}


def interrupted_move(
    lab: Lab, phase: str, act: Callable[[int], object], *, then: str = "pass"
) -> tuple[int, dict[str, Any]]:
    """Do something in a phase of a move, given its pid on this machine: the move's exit status and last event.

    `then` is what the move itself does next.
    """
    program = driver(HELD_AT[phase], before=f"os.kill(os.getpid(), signal.SIGSTOP); {then}")
    process = lab.start("host1", lab.python, "-c", program)
    pid = stopped(lab)
    act(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    output, errors = process.communicate(timeout=90)
    assert "Traceback" not in errors
    return process.returncode, json.loads(output.splitlines()[-1])


def stopped(lab: Lab) -> int:
    """The process of host1 that has stopped."""
    inside = os.readlink(f"/proc/{_pid(lab, 'host1')}/ns/pid")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
                if state == "T" and os.readlink(f"/proc/{name}/ns/pid") == inside:
                    return int(name)
    raise AssertionError("nothing has stopped")


@pytest.mark.parametrize("phase", HELD_AT)
def test_ctrl_c(lab: Lab, phase: str) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    code, last = interrupted_move(lab, phase, lambda pid: os.kill(pid, signal.SIGINT))
    assert code == (130 if phase == "preflight" else 10)
    assert "interrupted by SIGINT" in last["message"]
    assert (last["id"], "migration" in last) == ("web", True)
    assert phase == "preflight" or last["workload"] == "SOURCE"
    assert_still_here(lab, before)


@pytest.mark.parametrize("phase", HELD_AT)
def test_killed_coordinator(lab: Lab, phase: str) -> None:
    """kill -9 of `pymigrate move`: the container goes on here, and nothing of the move is left at the target."""
    lab.run()
    before = lab.wait_count("host1", 1)
    interrupted_move(lab, phase, lambda pid: os.kill(pid, signal.SIGKILL))
    assert_soon_clean(lab)
    assert_still_here(lab, before)


def agents(lab: Lab) -> list[str]:
    """The pids of agents, as host2 sees them."""
    find = "tr '\\0' ' ' < $p/cmdline 2>/dev/null | grep -q '^[^ ]*python3 -I -S /run/pymigrate/agent'"
    return lab.sh("host2", f"for p in /proc/[0-9]*; do {find} && echo ${{p#/proc/}}; done", check=False).split()


@pytest.mark.parametrize("phase", HELD_AT)
def test_killed_agent(lab: Lab, phase: str) -> None:
    """kill -9 of the agent cuts the connection in each phase."""
    lab.run()
    before = lab.wait_count("host1", 1)
    code, last = interrupted_move(lab, phase, lambda _: lab.sh("host2", f"kill -9 {' '.join(agents(lab))}"))
    assert code == (7 if phase == "preflight" else 10), last
    assert_still_here(lab, before)


@pytest.mark.slow
def test_cut_network_is_noticed_while_frozen(lab: Lab) -> None:
    """The cable is pulled: the container is back at work at the source within seconds, not at a far deadline."""
    lab.run()
    before = lab.wait_count("host1", 1)
    started = time.monotonic()
    # That the container goes on waits for no new connection; the end of the move does, in vain.
    then = "from migrate.wire import ssh_config; ssh_config.CONNECT_TIMEOUT = 1.0"
    try:
        cut = "ip link set eth0 down"
        code, last = interrupted_move(lab, "stop-and-copy", lambda _: lab.sh("host2", cut), then=then)
    finally:
        lab.sh("host2", "ip link set eth0 up")
    assert (code, last["workload"]) == (10, "SOURCE"), last
    assert time.monotonic() - started < 60
    lab.wait_count("host1", before)
    assert_soon_clean(lab)


@pytest.mark.slow
def test_a_target_that_takes_no_data_while_the_container_is_frozen(lab: Lab) -> None:
    """More images than fit into the connection's window."""
    lab.run(script=f"exec 9<>/tmp/x; rm /tmp/x; dd if=/dev/urandom bs=1M count=40 >&9 2>/dev/null; {COUNT}")
    before = lab.wait_count("host1", 1)
    stop = "pids = subprocess.run(['ssh', 'host2', %r], capture_output=True, check=True).stdout.decode().split()"
    program = driver(
        "send-images",
        before=(stop % "pgrep -f '^[^ ]*python3 -I -S /run/pymigrate/agent'") + "\n"
        "    subprocess.run(['ssh', 'host2', 'kill', '-STOP', *pids], check=True); agents.extend(pids)",
        body="from migrate.source import switchover\nagents = []; undo = switchover.Switchover.roll_back\n"
        "def roll_back(self):\n    undo(self)\n    subprocess.run(['ssh', 'host2', 'kill', '-CONT', *agents])\n"
        "switchover.Switchover.roll_back = roll_back\n"
        "run = main; main = lambda argv: run([*argv, '--timeout', '6'])",
    )
    done = lab.on("host1", lab.python, "-c", program, check=False)
    event = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, event["workload"]) == (10, "SOURCE"), (done.stdout, done.stderr)
    assert "takes no data" in event["message"]
    assert_still_here(lab, before)


REAL_CRIU = "$(test -x /opt/pymigrate/sbin/criu && echo /opt/pymigrate/sbin/criu || command -v criu)"


def crippled_criu(lab: Lab, host: str, when: str, how: str) -> str:
    """The path, at a host, of the real CRIU that runs under `how` (a shell command) if the condition `when` holds."""
    script = f'#!/bin/sh\nif {when}; then {how}; fi\nexec {REAL_CRIU} "$@"\n'
    lab.on(
        host,
        "sh",
        "-c",
        'mkdir -p /run/test && printf %s "$1" > /run/test/criu && chmod +x /run/test/criu',
        "sh",
        script,
    )
    return "/run/test/criu"


def test_criu_failing_at_dump(lab: Lab) -> None:
    """CRIU runs out of descriptors: the error holds CRIU's own reason, and its log is kept."""
    lab.run()
    before = lab.wait_count("host1", 1)
    # Only the dump inherits a second socket, that of the page stream.
    path = crippled_criu(lab, "host1", "[ $(ls -l /proc/$$/fd | grep -c socket:) -ge 2 ]", "ulimit -n 12")
    done = lab.on("host1", "env", f"PYMIGRATE_CRIU={path}", "pymigrate", "--json", "move", "web", "host2", check=False)
    event = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, event.get("workload")) == (10, "SOURCE"), event
    assert "criu failed to dump" in event["message"], event
    saved = re.search(r"CRIU's log: (\S+)", event["remedy"])
    assert saved is not None, event
    assert "Error" in lab.on("host1", "cat", saved[1]).stdout
    assert_still_here(lab, before)


def test_criu_failing_at_restore(lab: Lab) -> None:
    """CRIU at the target runs out of descriptors in the middle of the restore."""
    lab.run()
    before = lab.wait_count("host1", 1)
    # The restoring CRIU is the one that is already in the container's cgroup namespace.
    namespaces = '[ "$(readlink /proc/$$/ns/cgroup)" != "$(readlink /proc/1/ns/cgroup)" ]'
    path = crippled_criu(lab, "host2", namespaces, "ulimit -n 12")
    with log_in_environment(lab, f"PYMIGRATE_CRIU={path}"):
        status, event = failing_move(lab)
    assert (status, event["workload"]) == (10, "SOURCE"), event
    assert "criu failed to restore" in event["message"], event
    assert_still_here(lab, before)


def test_two_moves_of_one_container_at_once(lab: Lab) -> None:
    lab.run()
    before = lab.wait_count("host1", 1)
    first, second = (lab.start("host1", "pymigrate", "--json", "move", "web", "host2") for _ in range(2))
    outputs = [process.communicate(timeout=90)[0] for process in (first, second)]
    events = [json.loads(output.splitlines()[-1])["event"] for output in outputs]
    assert sorted(events) == ["error", "report"]
    lab.wait_count("host2", before)
    assert lab.ids("host1") == []


@pytest.mark.slow
def test_processes_that_end_at_any_moment(lab: Lab) -> None:
    """Many that begin and end while CRIU looks for all of them."""
    lab.run(script=f"(while :; do (: & :) & (:); done) & {COUNT}")
    before = lab.wait_count("host1", 5)
    for _ in range(3):
        for source, target in (("host1", "host2"), ("host2", "host1")):
            lab.on(source, "pymigrate", "move", "web", target)
            before = lab.wait_count(target, before)
    numbers = lab.numbers("host1")
    assert numbers == list(range(1, len(numbers) + 1))
