"""Which descriptors the program, an exec'ed one and the monitor have."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.boxes import make, output, wait_for
from tests.support.hosts import PYMIGRATE
from tests.system.conftest import Local

# The shell's own descriptors, without one that ls would have opened.
FDS = "for f in /proc/self/fd/*; do [ -e $f ] && echo ${f##*/}; done; true"


def with_files(pymigrate: Local, tmp_path: Path, *argv: object) -> "subprocess.CompletedProcess[str]":
    """pymigrate with the files f3 to f6 as descriptors 3 to 6."""
    script = f'cd {tmp_path}; exec 3>>f3 4>>f4 5>>f5 6>>f6; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *PYMIGRATE, "--root", str(pymigrate.root), *map(str, argv)],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_only_the_standard_streams_come_by_themselves(pymigrate: Local, tmp_path: Path) -> None:
    leak = os.open("/", os.O_PATH)
    os.set_inheritable(leak, True)
    said = output(pymigrate, tmp_path, FDS, None, close_fds=False)
    os.close(leak)
    assert said.split() == ["0", "1", "2"]


def test_preserved_in_run_and_exec(pymigrate: Local, tmp_path: Path) -> None:
    script = "echo a >&3; echo b >&4; " + FDS
    done = with_files(pymigrate, tmp_path, "run", "-b", make(tmp_path / "b", script), "--preserve-fds", "2", "c")
    assert done.stdout.split() == ["0", "1", "2", "3", "4"]
    pymigrate("run", "-d", "-b", make(tmp_path / "d", "sleep 60"), "d")
    done = with_files(pymigrate, tmp_path, "exec", "--preserve-fds", "3", "d", "sh", "-c", "echo c >&5; " + script)
    assert done.stdout.split() == ["0", "1", "2", "3", "4", "5"]
    assert [(tmp_path / f"f{n}").read_text() for n in (3, 4, 5, 6)] == ["a\na\n", "b\nb\n", "c\n", ""]


def test_preserved_in_create(pymigrate: Local, tmp_path: Path) -> None:
    bundle = make(tmp_path / "b", f"({FDS}) >&3; sleep 60")
    with_files(pymigrate, tmp_path, "create", "-b", bundle, "--preserve-fds", "1", "c")
    pymigrate("start", "c")
    assert wait_for(tmp_path / "f3", lines=4).split() == ["0", "1", "2", "3"]


def test_sockets_of_systemd_come_first(pymigrate: Local, tmp_path: Path) -> None:
    """Those of $LISTEN_FDS, of which the program is told, and then those of --preserve-fds."""
    bundle = make(tmp_path / "b", f"echo $LISTEN_FDS $LISTEN_PID; ({FDS}) 2>&1; echo x >&3; echo y >&4; echo z >&5")
    argv = pymigrate.argv("run", "-b", bundle, "--preserve-fds", "1", "c")

    def under(setting: str) -> "subprocess.CompletedProcess[str]":
        script = f'cd {tmp_path}; exec 3<>l0 4<>l1 5<>l2; export {setting}; exec "$@"'
        return subprocess.run(["bash", "-c", script, "bash", *argv], capture_output=True, text=True)

    done = under("LISTEN_FDS=2 LISTEN_PID=$$")
    assert done.stdout.split() == ["2", "1", "0", "1", "2", "3", "4", "5"], done
    assert [(tmp_path / f"l{n}").read_text() for n in range(3)] == ["x\n", "y\n", "z\n"]
    # What is said to another process is not for us.
    done = under("LISTEN_FDS=2 LISTEN_PID=1")
    assert done.stdout.split() == ["0", "1", "2", "3"], done
    done = under("LISTEN_FDS=1000 LISTEN_PID=$$")
    assert (done.returncode, "LISTEN_FDS=1000: descriptor " in done.stderr) == (2, True)


@pytest.mark.parametrize("verb", ["run", "exec"])
def test_those_that_are_not_open_are_refused(pymigrate: Local, tmp_path: Path, verb: str) -> None:
    if verb == "exec":
        pymigrate("run", "-d", "-b", make(tmp_path / "b", "sleep 60"), "c")
        done = pymigrate("exec", "--preserve-fds", "1", "c", "true", check=False)
    else:
        done = pymigrate("run", "--preserve-fds", "1", "-b", make(tmp_path / "b", "true"), "c", check=False)
    assert (done.returncode != 0, "--preserve-fds 1: descriptor 3 is not open" in done.stderr) == (True, True), done


def test_the_monitor_has_nothing_of_the_caller(pymigrate: Local, tmp_path: Path) -> None:
    with_files(pymigrate, tmp_path, "run", "-d", "-b", make(tmp_path / "b", "sleep 60"), "c")
    state = pymigrate.state("c")
    for pid in (state["monitor_pid"], state["pid"]):
        found = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        assert [name for name in found if str(tmp_path / "f") in name] == [], pid
    kinds = {os.readlink(link) for link in Path(f"/proc/{state['pid']}/fd").iterdir()}
    assert len(list(Path(f"/proc/{state['pid']}/fd").iterdir())) == 3, kinds
