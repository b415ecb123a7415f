"""Containers that do not do as they are told, in every status; bundles and processes that are gone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.linux import processes
from tests.support.boxes import PATIENCE, Fields, foreground, make, namespaces, wait_for
from tests.support.hosts import COUNT
from tests.system.conftest import Local

STUBBORN = "trap '' TERM INT HUP; echo up; while :; do sleep 0.05; done"


def status(pymigrate: Local, container: str = "c") -> str:
    return str(json.loads(pymigrate("state", container).stdout)["status"])


def await_status(pymigrate: Local, wanted: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while status(pymigrate) != wanted:
        assert time.monotonic() < deadline, status(pymigrate)


def await_output(pymigrate: Local, words: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while words not in pymigrate("logs", "c").stdout:
        assert time.monotonic() < deadline


def test_who_ignores_signals_can_be_killed(pymigrate: Local, tmp_path: Path) -> None:
    pymigrate("run", "-d", "-b", make(tmp_path / "b", STUBBORN), "c")
    await_output(pymigrate, "up")
    pymigrate("kill", "c")
    assert pymigrate("delete", "c", check=False).returncode != 0
    assert status(pymigrate) == "running"
    pymigrate("kill", "c", "KILL")
    await_status(pymigrate, "stopped")
    done = pymigrate("kill", "c", "KILL", check=False)
    assert (done.returncode != 0, "container not running" in done.stderr) == (True, True)
    pymigrate("delete", "c")
    gone = pymigrate("kill", "c", "KILL", check=False)
    assert (gone.returncode != 0, "does not exist" in gone.stderr) == (True, True)


@pytest.mark.parametrize("frozen", [False, True])
def test_delete_by_force(pymigrate: Local, tmp_path: Path, frozen: bool) -> None:
    pymigrate("run", "-d", "-b", make(tmp_path / "b", STUBBORN), "c")
    await_output(pymigrate, "up")
    pid = pymigrate.state("c")["pid"]
    if frozen:
        pymigrate("pause", "c")
    pymigrate("delete", "--force", "c")
    assert not Path(f"/proc/{pid}").exists()
    assert not (pymigrate.root / "c").exists()
    pymigrate("delete", "--force", "c")


def test_exec_by_status(pymigrate: Local, tmp_path: Path) -> None:
    pymigrate("create", "-b", make(tmp_path / "b", COUNT), "c")
    # Of a container whose program does not run yet, the namespaces are there.
    assert pymigrate("exec", "c", "hostname").stdout == "pymigrate\n"
    pymigrate("start", "c")
    pymigrate("pause", "c")
    done = pymigrate("exec", "c", "true", check=False)
    assert (done.returncode != 0, "paused" in done.stderr) == (True, True)
    with foreground(pymigrate, "exec", "--ignore-paused", "c", "echo", "thawed", stdout=subprocess.PIPE) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.3)
        pymigrate("resume", "c")
        assert waiting.wait(PATIENCE) == 0
        assert waiting.stdout is not None
        assert waiting.stdout.read() == "thawed\n"
    pymigrate("kill", "c", "KILL")
    await_status(pymigrate, "stopped")
    for words, container in (("stopped", "c"), ("does not exist", "other")):
        done = pymigrate("exec", container, "true", check=False)
        assert (done.returncode != 0, words in done.stderr) == (True, True), done


STEPS: dict[str, list[tuple[str, ...]]] = {
    "created": [], "running": [("start",)], "paused": [("start",), ("pause",)],
    "stopped": [("start",), ("kill", "KILL")],
}  # fmt: skip
REFUSED = {
    "created": ("pause", "resume"), "running": ("start", "resume", "delete"), "paused": ("start", "pause", "delete"),
    "stopped": ("start", "pause", "resume", "kill"),
}  # fmt: skip


@pytest.mark.parametrize("wanted", STEPS)
def test_verbs_that_a_status_does_not_allow(pymigrate: Local, tmp_path: Path, wanted: str) -> None:
    pymigrate("create", "-b", make(tmp_path / "b", STUBBORN), "c")
    for verb, *rest in STEPS[wanted]:
        pymigrate(verb, "c", *rest)
    await_status(pymigrate, wanted)
    for verb in REFUSED[wanted]:
        done = pymigrate(verb, "c", check=False)
        assert (done.returncode != 0, done.stderr != "") == (True, True), verb
        assert status(pymigrate) == wanted
    if wanted in ("created", "stopped"):
        pymigrate("delete", "c")


def test_kill_all(pymigrate: Local, tmp_path: Path) -> None:
    """Without a pid namespace processes outlive the container's init."""
    script = "sh -c 'echo $$ > /tmp/pid; exec sleep 77' & while ! [ -s /tmp/pid ]; do :; done; cat /tmp/pid"
    bundle = make(tmp_path / "b", script, {"linux.namespaces": namespaces("ipc", "uts", "network", "cgroup")})
    pymigrate("run", "-d", "-b", bundle, "c")
    await_status(pymigrate, "stopped")
    orphan = int(pymigrate("logs", "c").stdout)
    assert b"77" in Path(f"/proc/{orphan}/cmdline").read_bytes()
    pidfd = os.pidfd_open(orphan)
    pymigrate("kill", "--all", "c", "KILL")
    import select

    assert select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)
    pymigrate("delete", "c")


def test_kill_for_good_ends_all_of_a_container_without_a_pid_namespace(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "sleep 77 & echo $!; wait", {"linux.namespaces": namespaces("ipc", "uts", "network")})
    pymigrate("run", "-d", "-b", bundle, "c")
    child = int(wait_for(pymigrate.root / "c/log").split()[-1])
    pidfd = os.pidfd_open(child)
    try:
        pymigrate("kill", "c", "KILL")
        assert processes.wait_exit(pidfd, PATIENCE)
    finally:
        os.close(pidfd)


def test_pid_of_somebody_else_is_never_killed(pymigrate: Local, tmp_path: Path) -> None:
    """The number in state.json may be another process's by now: its start time tells."""
    with subprocess.Popen(["sleep", "60"]) as bystander:  # before: not in the same tick of the clock
        pymigrate("run", "-d", "-b", make(tmp_path / "b", STUBBORN), "c")
        path = pymigrate.root / "c/state.json"
        before = path.read_text()
        pid = pymigrate.state("c")["pid"]
        path.write_text(
            before.replace(f'"pid":{pid}', f'"pid":{bystander.pid}').replace(f'"pid": {pid}', f'"pid": {bystander.pid}')
        )
        assert pymigrate.state("c")["pid"] == bystander.pid
        assert status(pymigrate) == "stopped"
        for argv in (("kill", "c", "KILL"), ("exec", "c", "true")):
            assert pymigrate(*argv, check=False).returncode != 0
        assert bystander.poll() is None
        path.write_text(before)
        pymigrate("delete", "--force", "c")
        assert bystander.poll() is None
        bystander.kill()


# `pymigrate ARG...` in which the process that makes the namespaces is killed as soon as it has forked the init.
_KILLED = """
import os, signal, sys
from migrate.cli import main
from runtime.init import container as container_init
fork = container_init._fork
def fork_and_die(*args):
    pid = fork(*args)
    if pid:
        os.kill(os.getpid(), signal.SIGKILL)
    return pid
container_init._fork = fork_and_die
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("detached", [True, False])
def test_init_tells_of_itself(pymigrate: Local, tmp_path: Path, detached: bool) -> None:
    """Its parent told its pid: when that was killed, create and init waited for each other for a minute."""
    bundle = make(tmp_path / "b", "echo ran")
    argv = [sys.executable, "-c", _KILLED, "--root", pymigrate.root, "run", *(["-d"] if detached else []), "-b", bundle]
    done = subprocess.run([*map(str, argv), "c"], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    if detached:
        await_output(pymigrate, "ran\n")
    else:
        assert done.stdout == "ran\n"


def test_what_is_changed_in_the_bundle_later_is_not_the_containers(pymigrate: Local, tmp_path: Path) -> None:
    seccomp = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}],
    }
    fields: Fields = {"process.env+": ["A=before"], "linux.seccomp": seccomp}
    bundle = make(tmp_path / "b", COUNT, fields)
    pymigrate("run", "-d", "-b", bundle, "c")
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["env"].append("A=after")
    del config["linux"]["seccomp"]
    for text in (json.dumps(config), "{"):
        (bundle / "config.json").write_text(text)
        done = pymigrate("exec", "c", "sh", "-c", "echo $A; mkdir /tmp/x", check=False)
        assert (done.returncode, done.stdout, "Permission denied" in done.stderr) == (1, "before\n", True), done
    pymigrate("delete", "--force", "c")
    assert not (pymigrate.root / "c").exists()


def test_vanished_bundle(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", STUBBORN)
    pymigrate("run", "-d", "-b", bundle, "c")
    (bundle / "config.json").unlink()
    assert status(pymigrate) == "running"
    pymigrate("exec", "c", "true")
    pymigrate("pause", "c")
    pymigrate("resume", "c")
    pymigrate("kill", "c", "KILL")
    await_status(pymigrate, "stopped")
    shutil.rmtree(bundle)
    assert status(pymigrate) == "stopped"
    pymigrate("delete", "c")
    assert not (pymigrate.root / "c").exists()


def test_signals_to_run_reach_the_program(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "trap 'exit 9' USR1; touch /dev/shm/up; echo up; while :; do sleep 0.05; done")
    with foreground(pymigrate, "run", "-b", bundle, "c", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(PATIENCE) == 9
    assert not (pymigrate.root / "c").exists()


def test_changes_of_the_bundle_after_create_do_not_matter(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "echo first > /out; sleep 60")
    pymigrate("create", "-b", bundle, "c")
    config = (bundle / "config.json").read_text()
    (bundle / "config.json").write_text(config.replace("echo first", "echo second"))
    pymigrate("start", "c")
    assert wait_for(bundle / "rootfs/out") == "first\n"
