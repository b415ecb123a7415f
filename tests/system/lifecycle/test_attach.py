"""Terminals of detached containers: `attach`, and how they come along."""

import contextlib
import fcntl
import json
import os
import socket
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import Any

from runtime.freeze import monitor_hold
from runtime.monitor import attach
from runtime.spec.default import default_spec
from runtime.state.store import Store
from tests.support.boxes import PATIENCE, make, running, seat, wait_for
from tests.support.hosts import COUNT, driver, write_bundle
from tests.system.conftest import Lab, Local

TERMINAL = {"process.terminal": True}
DETACH = "\x10\x11"


def shell(pymigrate: Local, tmp_path: Path) -> None:
    pymigrate("run", "-d", "-b", make(tmp_path / "b", "exec sh", TERMINAL), "c")


def attached(pymigrate: Local, *flags: str, rows: int = 30, columns: int = 100) -> Any:
    return seat(pymigrate.argv("attach", *flags, "c"), rows, columns)


def test_use_leave_and_come_again(pymigrate: Local, tmp_path: Path) -> None:
    shell(pymigrate, tmp_path)
    with attached(pymigrate) as (screen, process):
        before = termios.tcgetattr(screen.master)
        screen.until("/ # ")
        screen.write("echo a$((20+1))b; stty -F /dev/tty size\r")
        screen.until("a21b\r\n30 100\r\n")
        screen.write(DETACH)
        assert process.wait(PATIENCE) == 0
        screen.until("[detached from c]")
        assert termios.tcgetattr(screen.master) == before
    assert pymigrate("state", "c").returncode == 0
    with attached(pymigrate, rows=20, columns=80) as (screen, process):
        screen.until("a21b")  # what it has shown last
        screen.write("stty -F /dev/tty size; exit 7\r")
        screen.until("20 80\r\n")
        assert process.wait(PATIENCE) == 7
    assert "a21b" in pymigrate("logs", "c").stdout


def test_size_follows(pymigrate: Local, tmp_path: Path) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do read -r line && exit; done"
    pymigrate("run", "-d", "-b", make(tmp_path / "b", script, TERMINAL), "c")
    with attached(pymigrate) as (screen, process):
        screen.until("ready")
        screen.until("30 100")
        fcntl.ioctl(screen.master, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 77, 0, 0))
        screen.until("41 77")
        screen.write("\r")
        assert process.wait(PATIENCE) == 0


def test_several_at_once_and_one_who_only_watches(pymigrate: Local, tmp_path: Path) -> None:
    shell(pymigrate, tmp_path)
    with (
        attached(pymigrate) as (first, one),
        attached(pymigrate, "--detach-keys", "ctrl-a,d") as (second, two),
        attached(pymigrate, "--no-stdin") as (third, three),
    ):
        for screen in (first, second, third):
            screen.until("/ # ")
        first.write("echo from-o'n'e\r")
        for screen in (first, second, third):
            screen.until("from-one\r")
        third.write("echo from-thr'e'e\r")
        second.write("\x10echo from-t'w'o\r")  # half of the others' detach keys
        for screen in (first, second, third):
            screen.until("from-two\r")
        assert "from-three" not in first.text
        second.write("\x01d")
        assert two.wait(PATIENCE) == 0
        first.write("exit 3\r")
        assert (one.wait(PATIENCE), three.wait(PATIENCE)) == (3, 3)


def test_interrupt_goes_to_the_foreground_job(pymigrate: Local, tmp_path: Path) -> None:
    """Even of a program that writes without a pause."""
    shell(pymigrate, tmp_path)
    with attached(pymigrate) as (screen, _):
        screen.until("/ # ")
        screen.write("yes\r")
        screen.until("y\r\ny\r\n")
        screen.write("\x03")
        screen.until("^C")
        screen.write("echo af't'er\r")
        screen.until("after\r\n")
        screen.write(DETACH)


def test_nobody_holds_it_up(pymigrate: Local, tmp_path: Path) -> None:
    """Clients that do not read, send nonsense or type without end: the container runs on, the monitor stays."""
    shell(pymigrate, tmp_path)
    state = Store(str(pymigrate.root)).load("c")
    sleepers = [attach.connect(state) for _ in range(40)]  # more than are served
    for sleeper in sleepers:
        sleeper.setblocking(False)
        with contextlib.suppress(OSError):
            sleeper.send(b"a")
    for packet in (b"\xff", b"s", b"s" + bytes(99), b"m", b"mhost", b"r", b"i", b"x" * 5000):
        with contextlib.suppress(OSError):
            sleepers[0].send(packet)
    stuffer = sleepers[1]
    with contextlib.suppress(OSError):
        stuffer.send(b"ised -n '/e[n]d/{s/.*/at the e''nd/p;q}'\r")
        for _ in range(10000):
            stuffer.send(b"i" + b"z" * 4000)
    for sleeper in sleepers[2:]:
        sleeper.close()
    stuffer.close()
    with attached(pymigrate) as (screen, _):
        screen.until("# ")
        screen.write("\x03")
        screen.until("^C")
        screen.write("i=0; while [ $i -lt 40000 ]; do echo a line of the many that there are $i; "
                     "i=$((i+1)); done; echo d'o'ne > /tmp/done\r")  # fmt: skip
        screen.until(" 10\r\n")
        path = Path(f"/proc/{pymigrate.state('c')['pid']}/root/tmp/done")
        assert wait_for(path) == "done\n"
    status = Path(f"/proc/{state.monitor_pid}/status").read_text()
    assert int(status.split("VmRSS:")[1].split()[0]) < 16 << 10
    sleepers[0].close()


def test_typing_into_a_full_terminal_and_leaving(pymigrate: Local, tmp_path: Path) -> None:
    """Again and again: what nobody has read is not kept without end."""
    pymigrate("run", "-d", "-b", make(tmp_path / "b", "stty raw; echo ready; exec sleep 1000", TERMINAL), "c")
    with attached(pymigrate) as (screen, _):
        screen.until("ready")
        screen.write(DETACH)
    state = Store(str(pymigrate.root)).load("c")
    for _ in range(150):
        with attach.connect(state) as sock:
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                while True:
                    sock.send(b"i" + b"z" * 4000)
    with attach.connect(state) as sock:  # it has looked at all of them when it answers
        sock.send(b"a")
        assert attach.receive(sock)[:1] == b"T"
    status = Path(f"/proc/{state.monitor_pid}/status").read_text()
    assert int(status.split("VmRSS:")[1].split()[0]) < 16 << 10


def test_holding_what_does_not_cease_to_write(pymigrate: Local, tmp_path: Path) -> None:
    """A monitor that is held takes what is there, and not what comes meanwhile: it is never busy for good."""
    pymigrate("run", "-d", "-b", make(tmp_path / "b", "yes & wait"), "c")
    deadline = time.monotonic() + PATIENCE
    while not pymigrate("logs", "--tail", "1", "c").stdout and time.monotonic() < deadline:
        pass
    hold = monitor_hold.Hold.begin(Store(str(pymigrate.root)).load("c"))
    hold.release()
    assert pymigrate("logs", "--tail", "1", "c").stdout == "y\n"


def test_one_who_was_too_slow_comes_again(pymigrate: Local, tmp_path: Path) -> None:
    """He sees the end, not all that was before it."""
    shell(pymigrate, tmp_path)
    with attached(pymigrate) as (screen, process):
        screen.until("/ # ")
        screen.write("seq 400000; echo e'n'd > /tmp/end; echo e'n'd\r")
        wait_for(Path(f"/proc/{pymigrate.state('c')['pid']}/root/tmp/end"))  # without anybody reading from us
        screen.until("\r\nend\r\n")
        assert len(screen.text) < 3 << 20
        screen.write("exit 0\r")
        assert process.wait(PATIENCE) == 0


def monitors_sockets(pymigrate: Local) -> int:
    """How many the monitor has: one more for each whom it serves."""
    fds = Path(f"/proc/{pymigrate.state('c')['monitor_pid']}/fd")
    return sum(os.readlink(fd).startswith("socket:") for fd in fds.iterdir())


def test_without_a_terminal(pymigrate: Local, tmp_path: Path) -> None:
    # Two pipes: the first writer may still have its end open when the program opens the second.
    script = "read go < /tmp/go; echo out; printf err >&2; read go < /tmp/end; exit 4"
    pymigrate("run", "-d", "-b", make(tmp_path / "b", f"mkfifo /tmp/go /tmp/end; {script}"), "c")
    argv = pymigrate.argv("attach", "c")
    before = monitors_sockets(pymigrate)
    with running(*argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + PATIENCE
        while monitors_sockets(pymigrate) == before and time.monotonic() < deadline:
            pass
        pymigrate("exec", "c", "sh", "-c", "echo > /tmp/go")
        assert process.stdout.readline() == "out\n"
        assert process.stderr.read(3) == "err"
        pymigrate("exec", "c", "sh", "-c", "echo > /tmp/end")
        assert process.wait(PATIENCE) == 4


def test_what_cannot_be_attached_to(pymigrate: Local, tmp_path: Path) -> None:
    shell(pymigrate, tmp_path)
    pymigrate("kill", "c", "KILL")
    with contextlib.suppress(ValueError):
        while json.loads(pymigrate("state", "c").stdout)["status"] != "stopped":
            pass
    for container, words in (("c", "it has stopped"), ("none", "does not exist")):
        done = pymigrate("attach", container, check=False)
        assert (done.returncode in (4, 5), words in done.stderr) == (True, True), done
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "console"))
    listener.listen(1)
    bundle = make(tmp_path / "d", "sleep 60", TERMINAL)
    pymigrate("run", "-d", "-b", bundle, "--console-socket", tmp_path / "console", "d")
    done = pymigrate("attach", "d", check=False)
    assert (done.returncode, "--console-socket" in done.stderr) == (5, True)
    listener.close()
    assert pymigrate("attach", "--detach-keys", "ctrl-", "d", check=False).returncode == 2


def test_snapshot_has_what_was_typed(pymigrate: Local, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "unused")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["process"] |= {"terminal": True, "args": ["sh"]}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    pymigrate("run", "-d", "-b", tmp_path / "b", "c")
    with attached(pymigrate) as (screen, process):
        screen.until("/ # ")
        screen.write("echo he'r'e; head -n 1\r")
        screen.until("here\r\n")
        screen.write("half a lime\x7f\x7f")
        screen.until("\x08 \x08\x08 \x08")
        assert pymigrate("snapshot", "save", "c", tmp_path / "s", check=False).returncode == 3
        pymigrate("snapshot", "save", "--allow", "terminal", "c", tmp_path / "s")
        screen.write("ne\r")  # it goes on as if nothing had been
        screen.until("half a line\r\n")
        screen.write("exit 5\r")
        assert process.wait(PATIENCE) == 5
    for word in ("mb", "st"):
        pymigrate("delete", "-f", "c")
        pymigrate("snapshot", "restore", tmp_path / "s")
        with attached(pymigrate) as (screen, process):
            screen.until("half a lime")
            screen.write(f"{word}\r")
            screen.until(f"half a li{word}\r\n")
            screen.write("exit 6\r")
            assert process.wait(PATIENCE) == 6


def start_shell(lab: Lab, script: str | None = None) -> None:
    process = default_spec()["process"] | {"terminal": True}
    lab.run(process=process, script=script or "exec sh", start=False)
    lab.on("host1", "pymigrate", "run", "-d", "-b", "/var/lib/pymigrate/test/web", "web")


def at(lab: Lab, host: str, **options: Any) -> Any:
    return seat(lab.argv(host, "pymigrate", "attach", "web"), env=lab.environment, **options)


def test_a_shell_with_jobs_there_and_back(lab: Lab) -> None:
    start_shell(lab)
    assert lab.on("host1", "pymigrate", "validate", "web", "host2", check=False).returncode == 3
    with at(lab, "host1") as (screen, process):
        screen.until("/ # ")
        screen.write("x=kept; echo he'r'e; cat\r")
        screen.until("here\r\n")
        screen.write("line\r")
        screen.until("line\r\nline\r\n")
        screen.write("\x1a")
        screen.until("Stopped")
        screen.write("echo sl'eep's; sleep 3; echo sl'ept'; head -n 1 | sed 's/^/got: /'\r")
        screen.until("sleeps\r\n")
        screen.write("typ\x7fed $x")
        screen.until("typ\x08 \x08ed $x")
        lab.on("host1", "pymigrate", "move", "--allow", "terminal", "web", "host2")
        assert process.wait(PATIENCE) == 15
        screen.until("[moved to host2: pymigrate attach web there]")
    assert lab.on("host2", "pymigrate", "validate", "--allow", "terminal", "web").stdout == "web can move\n"
    with at(lab, "host2") as (screen, process):
        screen.until("line\r\nline")  # what it has shown at host1
        screen.until("slept\r\n")
        screen.write("\r")
        screen.until("got: tyed $x\r\n")
        screen.write("echo $x; fg\r")
        screen.until("kept\r\ncat\r\n")
        screen.write("again\r")
        screen.until("again\r\nagain\r\n")
        lab.on("host2", "pymigrate", "move", "--allow", "terminal", "web", "host1")
        assert process.wait(PATIENCE) == 15
    with at(lab, "host1", rows=33, columns=99) as (screen, process):
        screen.until("again\r\nagain\r\n")
        screen.write("back\r")
        screen.until("back\r\nback\r\n")
        screen.write("\x03")
        screen.until("^C\r\n/ # ")
        screen.write("stty -F /dev/tty size; exit 9\r")
        screen.until("33 99\r\n")
        assert process.wait(PATIENCE) == 9


def test_output_is_whole_and_single(lab: Lab) -> None:
    """Of a program that writes all the time, across hosts and with somebody attached."""
    start_shell(lab, COUNT)
    before = lab.wait_count("host1", 5)
    with at(lab, "host1") as (screen, process):
        screen.until(f"\r\n{before + 10}\r\n")
        lab.on("host1", "pymigrate", "move", "--allow", "terminal", "web", "host2")
        assert process.wait(PATIENCE) == 15
    lab.wait_count("host2", before + 20)
    numbers = lab.numbers("host2")
    assert numbers == list(range(1, len(numbers) + 1))
    lab.on("host2", "pymigrate", "move", "--allow", "terminal", "web", "host1")
    lab.wait_count("host1", numbers[-1])
    numbers = lab.numbers("host1")
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_move_that_fails_is_not_noticed(lab: Lab) -> None:
    start_shell(lab)
    with at(lab, "host1") as (screen, process):
        screen.until("/ # ")
        screen.write("echo he'r'e; head -n 1\r")
        screen.until("here\r\n")
        screen.write("half a lime\x7f\x7f")
        screen.until("\x08 \x08\x08 \x08")
        program = driver("send-images", before="raise OSError('test')")
        program = program.replace('"move", "web"', '"move", "--allow", "terminal", "web"')
        done = lab.on("host1", lab.python, "-c", program, check=False)
        assert json.loads(done.stdout.splitlines()[-1])["workload"] == "SOURCE"
        screen.write("ne\r")
        screen.until("ne\r\nhalf a line\r\n")
        program = program.replace("raise OSError('test')", "os.kill(os.getpid(), 9)")
        screen.write("echo th'er'e; head -n 1\r")
        screen.until("there\r\n")
        screen.write("one more lime\x7f\x7f")
        screen.until("lime\x08 \x08\x08 \x08")
        assert lab.on("host1", lab.python, "-c", program, check=False).returncode == 137
        screen.write("ne\r")
        screen.until("\none more line\r\n")
        screen.write("exit 4\r")
        assert process.wait(PATIENCE) == 4


INNER = """
import os, pty, select
pid, master = pty.fork()
if pid == 0:
    os.execv("/bin/sh", ["sh"])
os.mkfifo("/tmp/keys")
keys, screen = os.open("/tmp/keys", os.O_RDWR), os.open("/tmp/screen", os.O_WRONLY | os.O_CREAT)
while True:
    for fd in select.select([keys, master], [], [])[0]:
        os.write(screen if fd == master else master, os.read(fd, 4096))
"""


def test_a_terminal_inside_comes_along(lab: Lab) -> None:
    """Both ends are the container's own: no rule speaks against it. Python is that of this machine."""
    places = (("/usr", "/usr"), ("/lib", "/usr/lib"), ("/lib64", "/usr/lib64"))
    mounts = [*default_spec()["mounts"], *(
        {"destination": place, "source": source, "type": "bind", "options": ["bind", "ro"]} for place, source in places
    )]  # fmt: skip
    lab.run(mounts=mounts, script=f"exec /usr/bin/python3 -I -S -c '{INNER}'", start=False)
    lab.sh("host1", "cd /var/lib/pymigrate/test/web/rootfs && rm lib64 && mkdir -p usr")
    lab.on("host1", "pymigrate", "run", "-d", "-b", "/var/lib/pymigrate/test/web", "web")
    lab.on("host1", "pymigrate", "exec", "web", "/bin/sh", "-c", "until [ -p /tmp/keys ]; do usleep 9000; done")
    say = "echo 'sleep 0.2; echo {0}''{0}; stty -F /dev/tty size' > /tmp/keys"
    lab.on("host1", "pymigrate", "exec", "web", "/bin/sh", "-c", say.format("a1"))
    until_inside(lab, "host1", "a1a1")
    assert lab.on("host1", "pymigrate", "validate", "web").stdout == "web can move\n"
    lab.on("host1", "pymigrate", "exec", "web", "/bin/sh", "-c", say.format("c3"))  # a job is in its foreground
    lab.on("host1", "pymigrate", "move", "web", "host2")
    until_inside(lab, "host2", "c3c3")
    lab.on("host2", "pymigrate", "exec", "web", "/bin/sh", "-c", say.format("b2"))
    until_inside(lab, "host2", "b2b2")


def until_inside(lab: Lab, host: str, words: str) -> None:
    script = f"i=0; until grep -q {words} /tmp/screen; do usleep 20000; i=$((i+1)); [ $i -lt 500 ] || exit 1; done"
    lab.on(host, "pymigrate", "exec", "web", "/bin/sh", "-c", script)


def test_a_terminal_of_an_exec_is_refused(lab: Lab) -> None:
    lab.run()
    argv = lab.argv("host1", "pymigrate", "exec", "-t", "web", "sh", "-c", "echo here; exec sleep 60")
    with seat(argv, env=lab.environment) as (screen, _):
        screen.until("here")
        done = lab.on("host1", "pymigrate", "--json", "validate", "web", check=False)
        (blocker,) = json.loads(done.stdout)["blockers"]
        assert (blocker["rule"], "exec -t web sh" in blocker["problem"]) == ("exec-session", True), blocker
