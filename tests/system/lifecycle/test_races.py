"""Verbs that meet another one in the middle: that one is done between two lines of theirs, at a place that is named."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.spec.default import default_spec
from tests.support.boxes import PATIENCE, make
from tests.support.hosts import COUNT
from tests.support.leaks import BRIDGE, leaks, left, own_network
from tests.system.conftest import Local
from tests.system.spec.test_lifecycle import await_output, await_status, status

# A verb with something done before or after a call of one function; {when} says which call.
_DRIVER = """
import os, sys
from migrate.cli import main
from migrate.commands import logs as logs_command
from runtime.lifecycle import control, delete, exec
from runtime.monitor import attach, logs
from runtime.state import store as state_store
from runtime.cgroups import cgroup
from runtime.linux import processes, selfexec
store = state_store.Store({root!r})
def end():
    found = store.load("c")
    control.kill(store, "c", 9)
    delete.end(found)
    delete.wait_monitor(found, 10)
owner, name = {where}
original = getattr(owner, name)
def replaced(*args, **kwargs):
    if not ({when}):
        return original(*args, **kwargs)
    setattr(owner, name, original)
    if {after}:
        result = original(*args, **kwargs)
        {meanwhile}
        return result
    {meanwhile}
    return original(*args, **kwargs)
setattr(owner, name, replaced)
sys.exit(main({argv!r}))
"""
END = "end()"
DELETE = "delete.delete(store, 'c', force=True)"


def command(
    pymigrate: Local, where: str, meanwhile: str, *argv: str, when: str = "True", after: bool = False
) -> list[str]:
    """A verb, as an argv, that has `meanwhile` done at `where`, an (owner, name) pair."""
    text = _DRIVER.format(
        root=str(pymigrate.root), where=where, meanwhile=meanwhile, when=when, after=after,
        argv=["--root", str(pymigrate.root), *argv],
    )  # fmt: skip
    return [sys.executable, "-c", text]


def run(argv: list[str]) -> tuple[int, str]:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("where", "when"),
    [("os, 'open'", "'error.fifo' in str(args[0])"), ("state_store.Store, 'save'", "True")],
    ids=["before it has looked", "before it has told the init"],
)
def test_start_of_one_that_is_killed(pymigrate: Local, tmp_path: Path, where: str, when: str) -> None:
    pymigrate("create", "-b", make(tmp_path / "b", COUNT), "c")
    code, said = run(command(pymigrate, where, END, "start", "c", when=when))
    assert (code, said) == (5, "pymigrate: error: cannot start a container that has stopped: c\n")


def test_create_of_one_that_is_killed(pymigrate: Local, tmp_path: Path) -> None:
    make(tmp_path / "b", COUNT)
    argv = ["create", "-b", str(tmp_path / "b"), "--net", f"bridge={BRIDGE},ip=10.99.0.5/24", "c"]
    with own_network():
        before = leaks(pymigrate.root)
        meanwhile, when = "delete.end(store.load('c'))", "str(args[0]).endswith('/ns/net') and 'self' not in args[0]"
        code, said = run(command(pymigrate, "os, 'open'", meanwhile, *argv, when=when))
        assert (code, said) == (1, "pymigrate: error: the container's init exited while it was being set up\n")
        assert left(before, pymigrate.root) == []


@pytest.mark.parametrize("flags", [[], ["--detach"]], ids=["", "detached"])
@pytest.mark.parametrize("where", ["selfexec, 'spawn_sealed'", "exec, '_finish'"])
def test_exec_in_one_that_is_killed(pymigrate: Local, tmp_path: Path, where: str, flags: list[str]) -> None:
    pymigrate("run", "-d", "-b", make(tmp_path / "b", COUNT), "c")
    code, said = run(command(pymigrate, where, END, "exec", *flags, "c", "true"))
    assert (code, said) == (255, "pymigrate: error: container not running: cannot exec c, it has stopped\n")


def test_exec_that_is_to_wait_for_who_pauses(pymigrate: Local, tmp_path: Path) -> None:
    pymigrate("run", "-d", "-b", make(tmp_path / "b", COUNT), "c")
    argv = command(
        pymigrate, "state_store.Store, 'lock'", "control.pause(store, 'c')", "exec", "--ignore-paused", "c", "true"
    )
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as waiting:
        await_status(pymigrate, "paused")
        with contextlib.suppress(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        pymigrate("resume", "c")
        assert (waiting.wait(PATIENCE), waiting.stderr and waiting.stderr.read()) == (0, "")


@pytest.mark.parametrize(
    ("meanwhile", "after", "code", "words"),
    [(END, False, 5, "has stopped"), (END, True, 5, "has stopped"), (DELETE, False, 4, "does not exist")],
)
def test_attach_to_one_that_ends(
    pymigrate: Local, tmp_path: Path, meanwhile: str, after: bool, code: int, words: str
) -> None:
    pymigrate("run", "-d", "-b", make(tmp_path / "b", COUNT), "c")
    found, said = run(command(pymigrate, "attach, 'connect'", meanwhile, "attach", "c", after=after))
    assert (found, words in said) == (code, True), said


def test_two_that_delete(pymigrate: Local, tmp_path: Path) -> None:
    pymigrate("create", "-b", make(tmp_path / "b", COUNT), "c")
    code, said = run(command(pymigrate, "state_store.Store, 'lock'", DELETE, "delete", "c"))
    assert (code, "does not exist" in said, "--force" in said) == (4, True, False), said
    assert os.listdir(pymigrate.root) == []


def test_events_of_one_that_is_deleted(pymigrate: Local, tmp_path: Path) -> None:
    pymigrate("run", "-d", "-b", make(tmp_path / "b", COUNT), "c")
    assert run(command(pymigrate, "cgroup.Cgroup, 'oom_events'", DELETE, "events", "c")) == (0, "")


def test_a_log_that_is_followed_is_whole(pymigrate: Local, tmp_path: Path) -> None:
    """What is written between the look at what there is and the wait for more, and the end as well."""
    script = "echo one; while ! [ -e /go ]; do usleep 10000; done; echo two"
    bundle = make(tmp_path / "b", script)
    pymigrate("run", "-d", "-b", bundle, "c")
    await_output(pymigrate, "one")
    meanwhile = f"os.close(os.open('{bundle}/rootfs/go', os.O_CREAT)); delete.wait_monitor(store.load('c'), 10)"
    argv = command(pymigrate, "logs_command, '_print'", meanwhile, "logs", "-f", "c", after=True)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "")


def test_what_is_being_created_has_not_stopped(pymigrate: Local, tmp_path: Path) -> None:
    """Who deletes what has stopped must not meet it: a look at the moment before its init is known."""
    seen = (
        "print(*(os.popen('{} -m migrate.cli --root {} ' + verb).read() for verb in ('state c', 'list')), flush=True)"
    )
    meanwhile = seen.format(sys.executable, pymigrate.root)
    argv = command(pymigrate, "cgroup.Cgroup, 'apply'", meanwhile, "create", "-b", "b", "c")
    make(tmp_path / "b", COUNT)
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (shown.returncode, shown.stdout.count("creating"), "stopped" in shown.stdout) == (0, 2, False), shown
    assert status(pymigrate) == "created"


def test_two_that_make_a_console_in_one_root_file_system(pymigrate: Local, tmp_path: Path) -> None:
    mounts = [mount for mount in default_spec()["mounts"] if mount["destination"] != "/dev"]
    make(tmp_path / "b", COUNT, {"process.terminal": True, "mounts": mounts})
    when = "args[0] == '/dev/console' and args[1] & os.O_CREAT"
    argv = ["run", "--detach", "-b", str(tmp_path / "b"), "c"]
    assert run(command(pymigrate, "os, 'open'", "os.close(original(*args))", *argv, when=when)) == (0, "")
    assert (tmp_path / "b/rootfs/dev/console").exists()
