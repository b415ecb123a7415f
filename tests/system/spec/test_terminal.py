"""process.terminal: in the foreground, by --console-socket, and in exec."""

import fcntl
import os
import signal
import struct
import termios
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.support.boxes import PATIENCE, Fields, Screen, listener, make, refusal, run, seat
from tests.support.hosts import PYMIGRATE
from tests.system.conftest import Local

TERMINAL: Fields = {"process.terminal": True}
# stty comes with an `stdin` of its own; TIOCGWINSZ says the size as busybox's stty does.
SIZE = "stty size"


def under_pty(pymigrate: Local, *argv: object, **size: int) -> AbstractContextManager[tuple[Screen, Any]]:
    """pymigrate with a terminal of the test's as its controlling one."""
    return seat([*PYMIGRATE, "--root", str(pymigrate.root), *map(str, argv)], **size)


def test_run_in_the_foreground(pymigrate: Local, tmp_path: Path) -> None:
    script = f"tty; {SIZE}; echo $TERM; read -r line; echo got $line; exit 5"
    bundle = make(tmp_path / "b", script, TERMINAL)
    with under_pty(pymigrate, "run", "-b", bundle, "c") as (screen, process):
        before = termios.tcgetattr(screen.master)
        screen.until("xterm\r\n")
        assert not termios.tcgetattr(screen.master)[3] & (termios.ICANON | termios.ECHO)
        screen.write("word\r")
        screen.until("got word\r\n")
        assert process.wait(PATIENCE) == 5
        assert termios.tcgetattr(screen.master) == before
        assert screen.text == "/dev/pts/0\r\n30 100\r\nxterm\r\nword\r\ngot word\r\n"


def test_size_follows(pymigrate: Local, tmp_path: Path) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do read -r line && exit; done"
    bundle = make(tmp_path / "b", script, TERMINAL)
    with under_pty(pymigrate, "run", "-b", bundle, "c") as (screen, process):
        screen.until("ready")
        fcntl.ioctl(screen.master, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 77, 0, 0))
        screen.until("41 77")
        screen.write("\r")
        assert process.wait(PATIENCE) == 0


def test_interrupt_reaches_the_foreground_job(pymigrate: Local, tmp_path: Path) -> None:
    script = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.05; done"
    with under_pty(pymigrate, "run", "-b", make(tmp_path / "b", script, TERMINAL), "c") as (screen, process):
        before = termios.tcgetattr(screen.master)
        screen.until("ready")
        screen.write("\x03")
        screen.until("caught")
        assert process.wait(PATIENCE) == 3
        assert termios.tcgetattr(screen.master) == before


def test_end_of_stdin_is_the_terminals_end(pymigrate: Local, tmp_path: Path) -> None:
    done = run(pymigrate, tmp_path, "cat; echo over", TERMINAL, input="abc\n", stdin=None)
    assert (done.returncode, done.stdout.replace("\r", "").splitlines()[-2:]) == (0, ["abc", "over"])


def test_terminal_is_deleted_with_raw_mode_undone_when_killed(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", "echo ready; sleep 60", TERMINAL)
    with under_pty(pymigrate, "run", "-b", bundle, "c") as (screen, process):
        before = termios.tcgetattr(screen.master)
        screen.until("ready")
        pymigrate("kill", "c", "KILL")
        assert process.wait(PATIENCE) == 137
        assert termios.tcgetattr(screen.master) == before
    assert not (pymigrate.root / "c").exists()


@pytest.mark.parametrize("user", [0, 1234])
def test_console_socket(pymigrate: Local, tmp_path: Path, user: int) -> None:
    script = "stty size; stat -c '%F %t:%T' /dev/console; echo by the console > /dev/console; tty; sh -i"
    size = {"height": 11, "width": 22}
    bundle = make(tmp_path / "b", script, {**TERMINAL, "process.consoleSize": size, "process.user.uid": user})
    with listener(tmp_path / "console") as agent:
        pymigrate("create", "-b", bundle, "--console-socket", agent.path, "c")
        name, master = agent.receive()
    screen = Screen(master)
    assert name == b"/dev/ptmx"
    pymigrate("start", "c")
    screen.until("/dev/pts/0\r\n")
    lines = screen.text.replace("\r", "").splitlines()
    assert lines[:1] + lines[2:4] == ["11 22", "by the console", "/dev/pts/0"]
    assert lines[1] == "character special file 88:0"
    assert "job control turned off" not in screen.text
    screen.write("sh -c \"echo g''o; sleep 50\"\r")
    screen.until("go\r\n")
    screen.write("\x1a")  # the shell stops its foreground job: that is job control
    screen.until("Stopped")
    screen.write("kill %1; exit 6\r")
    os.close(master)


def test_console_mounts_on_nothing_of_the_host(pymigrate: Local, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    for kind in ("link", "dangling", "file"):
        bundle = make(tmp_path / f"b-{kind}", "echo up; cat < /dev/null", TERMINAL)
        config = (bundle / "config.json").read_text()
        # /dev is the image's own, so that its /dev/console counts.
        (bundle / "config.json").write_text(config.replace('"destination": "/dev"', '"destination": "/dev2"'))
        console = bundle / "rootfs/dev/console"
        if kind == "file":
            console.write_text("plain")
        else:
            console.symlink_to(outside if kind == "link" else tmp_path / "made")
        with under_pty(pymigrate, "run", "-b", bundle, "c") as (screen, process):
            code = process.wait(PATIENCE)
            screen.until("up\r\n" if kind == "file" else "process.terminal: cannot be made")
        assert code == (0 if kind == "file" else 1)
        assert (outside.read_text(), (tmp_path / "made").exists()) == ("x", False)


def test_exec_with_a_terminal(pymigrate: Local, counting: Path, tmp_path: Path) -> None:
    pymigrate("run", "-d", "-b", counting, "c")
    with under_pty(pymigrate, "exec", "-t", "c", "sh", "-c", "tty; stty size; read x; exit $x") as (screen, process):
        before = termios.tcgetattr(screen.master)
        screen.until("30 100\r\n")
        screen.write("9\r")
        assert process.wait(PATIENCE) == 9
        assert termios.tcgetattr(screen.master) == before
    with listener(tmp_path / "console") as agent:
        pymigrate("exec", "-t", "-d", "--console-socket", agent.path, "c", "sh", "-c", "tty; read x")
        _, master = agent.receive()
    screen = Screen(master)
    screen.until("/dev/pts/0\r\n")
    screen.write("\r")
    os.close(master)


def test_exec_interrupted(pymigrate: Local, counting: Path) -> None:
    pymigrate("run", "-d", "-b", counting, "c")
    script = "trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.05; done"
    with under_pty(pymigrate, "exec", "-t", "c", "sh", "-c", script) as (screen, process):
        screen.until("ready")
        screen.write("\x03")
        assert process.wait(PATIENCE) == 4


def test_exec_without_a_terminal_cannot_reach_the_callers(pymigrate: Local, counting: Path) -> None:
    """What controls a terminal can type into it (TIOCSTI); signals of the caller are handed on all the same."""
    pymigrate("run", "-d", "-b", counting, "c")
    script = "(: < /dev/tty) 2> /dev/null && echo controls; trap 'exit 8' INT; echo ready; while :; do sleep 0.05; done"
    with under_pty(pymigrate, "exec", "c", "sh", "-c", script) as (screen, process):
        assert "controls" not in screen.until("ready")
        screen.write("\x03")
        assert process.wait(PATIENCE) == 8


def test_what_does_not_fit_is_refused(pymigrate: Local, counting: Path, tmp_path: Path) -> None:
    done = pymigrate("create", "-b", make(tmp_path / "b", "true", TERMINAL), "c", check=False)
    assert (done.returncode != 0, "console socket" in done.stderr) == (True, True)
    assert "console socket" in refusal(pymigrate, tmp_path, {}, "--console-socket", tmp_path / "none")
    missing = refusal(pymigrate, tmp_path, TERMINAL, "-d", "--console-socket", tmp_path / "none")
    assert f"--console-socket {tmp_path / 'none'}: No such file" in missing
    pymigrate("run", "-d", "-b", counting, "d")
    done = pymigrate("exec", "-t", "-d", "d", "true", check=False)
    assert (done.returncode != 0, "console socket" in done.stderr) == (True, True)


def test_terminal_without_devpts(pymigrate: Local, tmp_path: Path) -> None:
    with under_pty(pymigrate, "run", "-b", make(tmp_path / "b", "true", {**TERMINAL, "mounts": []}), "c") as (
        screen,
        process,
    ):
        assert process.wait(PATIENCE) != 0
        screen.until("process.terminal: cannot be made")


def test_hangup(pymigrate: Local, tmp_path: Path) -> None:
    """Who has the terminal goes: `run` hands the signal on, and the container is gone with it."""
    bundle = make(tmp_path / "b", "trap 'exit 7' HUP; echo ready; while :; do sleep 0.05; done", TERMINAL)
    with under_pty(pymigrate, "run", "-b", bundle, "c") as (screen, process):
        screen.until("ready")
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE) == 7
    assert not (pymigrate.root / "c").exists()
