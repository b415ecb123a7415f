"""What must never happen: the end of another container, or one that nobody can end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.boxes import make
from tests.support.hosts import COUNT, write_bundle
from tests.system.conftest import Local

# Runs a command as a child of a process that adopts what it leaves behind.
ADOPT = (
    "import subprocess, sys; from runtime.linux import syscalls; syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1); "
    "sys.exit(subprocess.run(sys.argv[1:]).returncode)"
)


def status(pymigrate: Local, container: str) -> str:
    value: str = json.loads(pymigrate("state", container).stdout)["status"]
    return value


def wait_status(pymigrate: Local, container: str, wanted: str) -> None:
    deadline = time.monotonic() + 10
    while status(pymigrate, container) != wanted:
        assert time.monotonic() < deadline, f"{container} does not become {wanted}"


@pytest.fixture
def other(tmp_path: Path) -> Local:
    """The same command line with another --root."""
    return Local(tmp_path / "other")


@pytest.mark.parametrize("verb", ["delete", "kill"])
def test_a_cgroup_that_is_anothers_by_now(pymigrate: Local, other: Local, tmp_path: Path, verb: str) -> None:
    """Without cgroupsPath it is named after the id: below another --root the same id has the same one."""
    write_bundle(tmp_path / "short", "true")
    write_bundle(tmp_path / "long", COUNT)
    pymigrate("run", "-d", "-b", tmp_path / "short", "safe")
    wait_status(pymigrate, "safe", "stopped")
    other("run", "-d", "-b", tmp_path / "long", "safe")
    try:
        pymigrate("delete", "safe") if verb == "delete" else pymigrate("kill", "--all", "safe", "KILL")
        assert status(other, "safe") == "running"
        other("exec", "safe", "true")
    finally:
        other("delete", "--force", "safe")


def test_a_run_in_the_foreground_deletes_only_its_own(pymigrate: Local, bundle: Path) -> None:
    first = subprocess.Popen(pymigrate.argv("run", "-b", bundle, "safe"), stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline()
    pymigrate("exec", "safe", "true")  # waits until `run` has let go of the container's lock
    first.send_signal(signal.SIGSTOP)
    pymigrate("delete", "--force", "safe")
    pymigrate("run", "-d", "-b", bundle, "safe")
    first.send_signal(signal.SIGCONT)
    first.stdout.read()
    first.stdout.close()
    assert first.wait(20) == 137
    assert status(pymigrate, "safe") == "running"


def test_a_container_that_stops_who_comes_in_can_be_ended(pymigrate: Local, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "while :; do kill -STOP -1; done")
    pymigrate("run", "-d", "-b", tmp_path / "b", "safe")
    coming = subprocess.Popen(pymigrate.argv("exec", "safe", "true"), stderr=subprocess.PIPE)
    inside = Path("/proc", str(pymigrate.state("safe")["pid"]), "root/proc")
    deadline = time.monotonic() + 10
    while len([name for name in os.listdir(inside) if name.isdigit()]) < 2 and time.monotonic() < deadline:
        pass
    pymigrate("kill", "safe", "KILL")
    pymigrate("delete", "--force", "safe")
    coming.communicate(timeout=20)


def test_kill_ends_a_paused_container(pymigrate: Local, bundle: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "safe")
    pymigrate("pause", "safe")
    pymigrate("kill", "safe", "KILL")
    wait_status(pymigrate, "safe", "stopped")


def test_a_restore_that_fails_leaves_nothing(pymigrate: Local, bundle: Path, tmp_path: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "safe")
    images = ["--image-path", str(tmp_path / "images"), "--work-path", str(tmp_path / "work")]
    pymigrate("checkpoint", *images, "safe")
    done = pymigrate("restore", "-d", "-b", bundle, *images, "--pid-file", "/nonexistent/pid", "safe", check=False)
    assert (done.returncode, "/nonexistent/pid: cannot be written" in done.stderr) == (1, True)
    assert pymigrate("list", "-q").stdout == ""


@pytest.mark.parametrize(
    ("mount", "allowed"),
    [
        ({"destination": "/proc", "type": "tmpfs", "source": "tmpfs"}, False),
        ({"destination": "/proc", "type": "bind", "source": "/usr", "options": ["bind"]}, False),
        ({"destination": "/proc/./self", "type": "tmpfs", "source": "tmpfs"}, False),
        ({"destination": "/proc/sys", "type": "bind", "source": "/usr", "options": ["bind"]}, False),
        ({"destination": "/proc/uptime", "type": "bind", "source": "/etc/hostname", "options": ["bind"]}, True),
    ],
)
def test_proc_is_the_kernels(pymigrate: Local, tmp_path: Path, mount: dict[str, object], allowed: bool) -> None:
    write_bundle(tmp_path / "b", "true")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["mounts"].append(mount)
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    done = pymigrate("run", "-b", tmp_path / "b", "safe", check=False)
    assert done.returncode == (0 if allowed else 6), done.stderr
    assert allowed or "config.json: mounts[8].destination: " in done.stderr


def test_a_subreaper_that_asks_for_no_pid_file_is_no_engine(pymigrate: Local, bundle: Path) -> None:
    """A log-in session, a supervisor: what it starts is not for it to watch over."""
    for argv in (["run", "-d"], ["create"]):
        done = subprocess.run(
            [sys.executable, "-c", ADOPT, *pymigrate.argv(*argv, "-b", bundle, "safe")],
            stdout=subprocess.PIPE, timeout=20,
        )  # fmt: skip
        assert done.returncode == 0
        assert pymigrate.state("safe")["monitor_pid"] != 0
        pymigrate("delete", "--force", "safe")


def test_a_wrong_root_costs_nobody_anything(pymigrate: Local) -> None:
    directory = pymigrate.root / "etc"
    (directory / "conf.d").mkdir(parents=True)
    (directory / "passwd").write_text("x")
    done = pymigrate("delete", "--force", "etc", check=False)
    assert (done.returncode, "cannot be removed" in done.stderr) == (1, True)
    assert (directory / "passwd").read_text() == "x"
    (directory / "passwd").unlink()
    (directory / "conf.d").rmdir()
    directory.rmdir()
    (pymigrate.root / ".etc.lock").unlink()


def test_a_hook_may_leave_a_process_behind(pymigrate: Local, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"sleep 60 & echo $! > {pid}"], "timeout": 5}
    write_bundle(tmp_path / "b", "true", hooks={"createRuntime": [hook]})
    begin = time.monotonic()
    pymigrate("run", "-b", tmp_path / "b", "safe")
    os.kill(int(pid.read_text()), signal.SIGKILL)
    assert time.monotonic() - begin < 30


def test_much_input_to_a_terminal(pymigrate: Local, tmp_path: Path) -> None:
    """It takes little at a time, and only while what it shows is taken."""
    write_bundle(tmp_path / "b", "stty raw -echo; echo go; head -c 300000 | wc -c")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["process"]["terminal"] = True
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    running = subprocess.Popen(
        pymigrate.argv("run", "-b", tmp_path / "b", "safe"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert running.stdout is not None
    assert running.stdout.readline().strip() == b"go"  # before that, a terminal takes no more than a line
    shown, _ = running.communicate(b"x" * 300_000, timeout=20)
    assert running.returncode == 0
    assert shown.split()[-1:] == [b"300000"]


def test_nothing_can_be_written_to_by_others_whatever_the_umask(tmp_path: Path) -> None:
    """Services have 0 as often as not."""
    make(tmp_path / "b", COUNT)
    place = tmp_path / "new"
    open_umask = {"preexec_fn": lambda: os.umask(0) and None}
    place.mkdir()
    local = Local(place / "run/containers")
    steps: list[list[object]] = [
        ["--log", place / "log", "run", "-d", "-b", tmp_path / "b", "--pid-file", place / "pid", "safe"],
        ["exec", "-d", "safe", "true"],
        ["snapshot", "save", "safe", place / "snapshot", "--allow", "writable-rootfs"],
        ["checkpoint", "--image-path", place / "images/1", "--work-path", place / "work/1", "safe"],
        ["--log", place / "log", "restore", "-d", "-b", tmp_path / "b", "--image-path", place / "images/1", "safe"],
        ["pause", "safe"],
    ]
    try:
        for argv in steps:
            local(*argv, **open_umask)
            open_to_all = [path for path in place.rglob("*") if path.lstat().st_mode & 0o022 and not path.is_symlink()]
            assert open_to_all == [], argv
    finally:
        local("delete", "--force", "safe")


HOOKED = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
state = json.loads(path.read_text())
state["hooks"] = {"poststop": [{"path": "/bin/touch", "args": ["touch", sys.argv[2]], "env": [], "timeout": None}]}
path.write_text(json.dumps(state))
"""


@pytest.mark.parametrize("other", ["root", "parent", "open", "link"])
def test_a_state_directory_of_another_user_is_not_used(tmp_path: Path, other: str) -> None:
    """What lies there is the other user's word: hooks, pids, cgroups. Root would run and kill what it says."""
    local = Local(tmp_path / "home/root")
    make(tmp_path / "b", "sleep 1000")
    local("run", "-d", "-b", tmp_path / "b", "safe")
    ran = tmp_path / "ran"
    subprocess.run([sys.executable, "-c", HOOKED, local.root / "safe/state.json", ran], check=True)
    link = tmp_path / "link"
    link.symlink_to(local.root)
    changed = {"root": local.root, "parent": local.root.parent, "open": local.root, "link": link}[other]
    os.chmod(changed, 0o777) if other == "open" else os.chown(changed, 65534, 65534, follow_symlinks=False)
    used = Local(link) if other == "link" else local
    try:
        for argv in (
            ["list"], ["state", "safe"], ["logs", "safe"], ["exec", "safe", "true"], ["kill", "safe", "KILL"],
            ["delete", "--force", "safe"], ["create", "-b", tmp_path / "b", "new"], ["validate", "safe", "localhost"],
        ):  # fmt: skip
            done = used(*argv, check=False)
            assert done.returncode == (255 if argv[0] == "exec" else 6), (argv, done)
            words = "can be changed by other users" if other == "open" else "belongs to user 65534"
            assert f"--root {used.root}: {changed} {words}" in done.stderr, (argv, done.stderr)
        assert not ran.exists()
        assert [path.name for path in local.root.iterdir() if path.name[0] != "."] == ["safe"]
    finally:
        os.chown(changed, 0, 0, follow_symlinks=False)
        os.chmod(local.root, 0o700)
    local("delete", "--force", "safe")
    assert ran.exists()


def test_a_state_directory_is_not_made_where_others_could_replace_it(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    make(tmp_path / "b", "true")
    done = Local(tmp_path / "open/a/b")("run", "-b", tmp_path / "b", "safe", check=False)
    assert (done.returncode, f"{tmp_path}/open can be changed by other users" in done.stderr) == (6, True), done.stderr
    assert list((tmp_path / "open").iterdir()) == []
