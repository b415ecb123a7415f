"""What fails is one error that names its field, whenever it fails, and leaves nothing."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrate.cli.exit_codes import EXIT_CODES
from runtime.cgroups.cgroup import Cgroup
from runtime.cgroups.hierarchies import discover
from runtime.errors import StateError
from tests.support.hosts import PYMIGRATE, write_bundle
from tests.support.leaks import leaks, left
from tests.system.conftest import Local

OWN = f"errors-{os.getpid()}"


@pytest.fixture
def clean(pymigrate: Local) -> Iterator[None]:
    before = leaks(pymigrate.root, OWN)
    yield
    assert left(before, pymigrate.root, OWN) == []


def change(bundle: Path, **fields: Any) -> None:
    """Set fields of the bundle's config.json, named by paths with __ for a dot."""
    config = json.loads((bundle / "config.json").read_text())
    for path, value in fields.items():
        *parents, name = path.split("__")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    (bundle / "config.json").write_text(json.dumps(config))


def error_of(done: "subprocess.CompletedProcess[str]", code: str = "failure") -> str:
    """The one error that was shown; `exec` has one exit code for all."""
    first, *rest = done.stderr.splitlines()
    assert done.returncode == (255 if code == "exec" else EXIT_CODES[code][0]), done.stderr
    assert first.startswith("pymigrate: error: "), done.stderr
    assert all(line.startswith("  ") for line in rest), done.stderr
    return first.removeprefix("pymigrate: error: ")


@pytest.mark.parametrize("detach", [(), ("-d",)], ids=["foreground", "detached"])
@pytest.mark.parametrize("size", [None, 0], ids=["", "no file size"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"process__args": ["/no-interpreter"]}, "process.args[0]: exec: '/no-interpreter': exec format error"),
        ({"hooks__startContainer": [{"path": "/bin/false"}]}, "hooks.startContainer[0] (/bin/false): exit status 1"),
    ],
    ids=["exec", "hook"],
)  # fmt: skip
def test_what_fails_after_start_is_an_error_of_start(
    pymigrate: Local, bundle: Path, clean: None, fields: Any, words: str, size: int | None, detach: tuple[str, ...]
) -> None:
    (bundle / "rootfs/no-interpreter").write_text("x")
    (bundle / "rootfs/no-interpreter").chmod(0o755)
    change(bundle, **fields)
    if size is not None:
        change(bundle, process__rlimits=[{"type": "RLIMIT_FSIZE", "soft": size, "hard": size}])
    done = pymigrate("run", *detach, "-b", bundle, OWN, check=False, stdin=subprocess.DEVNULL)
    assert error_of(done) == words


def test_after_a_failed_start_the_container_has_stopped(pymigrate: Local, bundle: Path) -> None:
    change(bundle, hooks__startContainer=[{"path": "/bin/false"}])
    pymigrate("create", "-b", bundle, OWN)
    error_of(pymigrate("start", OWN, check=False))
    assert json.loads(pymigrate("state", OWN).stdout)["status"] == "stopped"
    pymigrate("delete", OWN)


def test_failing_exec_says_why(pymigrate: Local, bundle: Path) -> None:
    (bundle / "rootfs/no-interpreter").write_text("x")
    (bundle / "rootfs/no-interpreter").chmod(0o755)
    pymigrate("run", "-d", "-b", bundle, OWN)
    done = pymigrate("exec", OWN, "/no-interpreter", check=False)
    assert error_of(done, "exec") == "process.args[0]: exec: '/no-interpreter': exec format error"


@pytest.mark.parametrize("point", ["poststart", "poststop"])
def test_late_hooks_that_fail_are_warnings_and_the_rest_runs(
    pymigrate: Local, bundle: Path, clean: None, tmp_path: Path, point: str
) -> None:
    seen = tmp_path / "seen"
    change(
        bundle, **{f"hooks__{point}": [{"path": "/bin/false"}, {"path": "/bin/touch", "args": ["touch", str(seen)]}]}
    )
    pymigrate("create", "-b", bundle, OWN)
    started = pymigrate("--log", tmp_path / "log", "--log-format", "json", "start", OWN)
    deleted = pymigrate("--log", tmp_path / "log", "--log-format", "json", "delete", "--force", OWN)
    warning = f"hooks.{point}[0] (/bin/false): exit status 1"
    assert started.stderr + deleted.stderr == f"pymigrate: warning: {warning}\n"
    assert seen.exists()
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(entry["level"], entry["msg"]) for entry in entries] == [("warning", warning)]


@pytest.mark.parametrize("limit", [1, 4096, 300_000])
def test_too_little_memory_is_named(pymigrate: Local, bundle: Path, clean: None, limit: int) -> None:
    change(bundle, linux__resources__memory={"limit": limit})
    began = time.monotonic()
    message = error_of(pymigrate("create", "-b", bundle, OWN, check=False))
    assert message.startswith(f"linux.resources.memory.limit: {limit}: ")
    assert time.monotonic() - began < 10


def test_too_few_processes_are_named(pymigrate: Local, bundle: Path, clean: None) -> None:
    change(bundle, linux__resources__pids={"limit": 1})
    message = error_of(pymigrate("create", "-b", bundle, OWN, check=False))
    assert message.startswith("linux.resources.pids.limit: 1: ")


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_limit_of_descriptors_holds_for_the_program_only(pymigrate: Local, tmp_path: Path, number: int) -> None:
    write_bundle(tmp_path / "few", "ulimit -n")
    change(tmp_path / "few", process__rlimits=[{"type": "RLIMIT_NOFILE", "soft": number, "hard": number}])
    assert pymigrate("run", "-b", tmp_path / "few", OWN).stdout == f"{number}\n"


def test_a_mount_on_the_root_and_the_root_cgroup_are_refused(pymigrate: Local, bundle: Path, clean: None) -> None:
    change(bundle, linux__cgroupsPath="/./")
    message = error_of(pymigrate("create", "-b", bundle, OWN, check=False), "invalid")
    assert message.startswith("config.json: linux.cgroupsPath: ")
    change(bundle, linux__cgroupsPath="", mounts=[{"destination": "/", "type": "tmpfs", "source": "x"}])
    message = error_of(pymigrate("create", "-b", bundle, OWN, check=False), "invalid")
    assert message.startswith("config.json: mounts[0].destination: ")


def test_a_bind_source_may_be_relative_to_the_bundle(pymigrate: Local, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "cat /mnt/name")
    (tmp_path / "b/data").mkdir()
    (tmp_path / "b/data/name").write_text("here")
    config = json.loads((tmp_path / "b/config.json").read_text())
    mount = {"destination": "/mnt", "type": "bind", "source": "data", "options": ["bind"]}
    change(tmp_path / "b", mounts=[*config["mounts"], mount])
    assert pymigrate("run", "-b", tmp_path / "b", OWN, cwd="/").stdout == "here"


def test_what_a_message_quotes_is_escaped_and_shortened_everywhere(
    pymigrate: Local, bundle: Path, tmp_path: Path
) -> None:
    change(bundle, process__cwd="/dev/null/\x1b[31m\n" + "x" * 5000)
    log = tmp_path / "log"
    shown = error_of(pymigrate("--log", log, "--log-format", "json", "create", "-b", bundle, OWN, check=False))
    event = json.loads(pymigrate("--json", "create", "-b", bundle, OWN, check=False).stdout)
    entry = json.loads(log.read_text())
    assert shown == event["message"] == entry["msg"]
    assert shown.startswith("process.cwd: /dev/null/\\x1b[31m\\nxxx")
    assert "characters]" in shown
    assert shown.isprintable()
    assert len(shown) < 1100


def test_cgroup_parents_go_with_the_last_container_and_strangers_stay(pymigrate: Local, bundle: Path) -> None:
    mounts = [hierarchy.mountpoint for hierarchy in discover()]
    theirs = f"{mounts[0]}/{OWN}-theirs"
    os.mkdir(theirs)
    try:
        for parent in (f"/{OWN}/deep", f"/{OWN}-theirs"):
            for name in ("one", "two"):
                change(bundle, linux__cgroupsPath=f"{parent}/{name}")
                pymigrate("create", "-b", bundle, f"{OWN}-{name}")
            # The one that has made the parents goes first.
            pymigrate("delete", f"{OWN}-one")
            assert all(os.path.isdir(f"{mount}{parent}/two") for mount in mounts)
            pymigrate("delete", f"{OWN}-two")
        assert [mount for mount in mounts if os.path.exists(f"{mount}/{OWN}")] == []
        assert [mount for mount in mounts if os.path.exists(f"{mount}/{OWN}-theirs")] == [mounts[0]]
    finally:
        os.rmdir(theirs)


def test_a_busy_cgroup_is_refused_and_nothing_is_left_elsewhere(pymigrate: Local, bundle: Path) -> None:
    mounts = [hierarchy.mountpoint for hierarchy in discover()]
    busy = f"{mounts[0]}/{OWN}-busy"
    os.mkdir(busy)
    sleeper = subprocess.Popen(["sleep", "100"])
    try:
        if "cpuset" in mounts[0]:
            pytest.skip("the first hierarchy is that of cpuset")
        Path(busy, "cgroup.procs").write_text(str(sleeper.pid))
        change(bundle, linux__cgroupsPath=f"/{OWN}-busy")
        message = error_of(pymigrate("create", "-b", bundle, OWN, check=False), "conflict")
        assert message.startswith("linux.cgroupsPath: ")
        assert sleeper.poll() is None
        assert [mount for mount in mounts[1:] if os.path.exists(f"{mount}/{OWN}-busy")] == []
    finally:
        sleeper.kill()
        sleeper.wait()
        deadline = time.monotonic() + 5
        while Path(busy, "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)  # the kernel tells nobody
        os.rmdir(busy)


# Every forged state is read in a pid namespace of the test's own: no process outside of it can be named there.
ALONE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.mark.parametrize(
    ("forged", "words"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"ociVersion": "1.0.2-dev", "id": "x", "init_process_pid": 1}', "is not a state of this version"),
        ({"id": "another"}, "id: is the id of another container"),
        ({"pid": -1}, "pid: is not a process id"),
        ({"monitor_pid": 10**30}, "pid: is not a process id"),
        ({"cgroup_paths": {"memory": 5}}, "cgroup_paths: must hold strings"),
        ({"cgroup_paths": {"memory": discover()[0].mountpoint}}, "is not the cgroup of a container"),
        ({"cgroup_paths": {"memory": "/tmp"}}, "is not the cgroup of a container"),
    ],
)  # fmt: skip
def test_a_damaged_state_is_refused_and_only_its_directory_removed(
    pymigrate: Local, bundle: Path, forged: Any, words: str
) -> None:
    if "cgroup of" in words:  # before anything acts upon it
        with pytest.raises(StateError):
            Cgroup(forged["cgroup_paths"]).require_own()
    pymigrate("create", "-b", bundle, OWN)
    state = pymigrate.state(OWN)
    pymigrate("delete", OWN)
    path = pymigrate.root / OWN / "state.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**state, **forged}) if isinstance(forged, dict) else forged)

    def alone(*argv: object) -> "subprocess.CompletedProcess[str]":
        command = [*ALONE, *PYMIGRATE, "--root", str(pymigrate.root), *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)

    assert words in error_of(alone("delete", OWN), "invalid")
    assert alone("delete", "--force", OWN).returncode == 0
    assert list(pymigrate.root.iterdir()) == []


def test_a_container_with_a_damaged_state_runs_on(pymigrate: Local, bundle: Path, tmp_path: Path) -> None:
    """Nothing is begun that would then not be allowed to end: neither limits elsewhere, nor a dump."""
    pymigrate("run", "-d", "-b", bundle, OWN)
    path = pymigrate.root / OWN / "state.json"
    good = path.read_text()
    hierarchy = next(one for one in discover() if "name=" not in one.controllers[0])
    forged = {hierarchy.controllers[0]: hierarchy.mountpoint}
    path.write_text(json.dumps({**json.loads(good), "cgroup_paths": forged}))
    try:
        for argv in (("update", "--pids-limit", "5"), ("checkpoint", "--image-path", tmp_path / "images")):
            assert "is not the cgroup of a container" in error_of(pymigrate(*argv, OWN, check=False), "invalid")
    finally:
        path.write_text(good)
    assert json.loads(pymigrate("state", OWN).stdout)["status"] == "running"


def test_a_pid_that_is_another_process_now_is_left_alone(pymigrate: Local, bundle: Path) -> None:
    pymigrate("create", "-b", bundle, OWN)
    state = pymigrate.state(OWN)
    pymigrate("delete", OWN)
    (pymigrate.root / OWN).mkdir()
    sleeper = subprocess.Popen(["sleep", "100"])
    try:
        forged = state | {"pid": sleeper.pid, "monitor_pid": sleeper.pid, "cgroup_paths": {}}
        (pymigrate.root / OWN / "state.json").write_text(json.dumps(forged))
        error_of(pymigrate("kill", OWN, "KILL", check=False), "conflict")
        pymigrate("delete", "--force", OWN)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_verbs_of_a_container_that_is_not_there_make_nothing(pymigrate: Local) -> None:
    for verb in (("start", OWN), ("kill", OWN), ("pause", OWN), ("resume", OWN), ("delete", OWN), ("state", OWN)):
        assert "does not exist" in error_of(pymigrate(*verb, check=False), "not-found")
    assert not pymigrate.root.exists()


def test_a_root_that_is_a_file_or_full(pymigrate: Local, bundle: Path, tmp_path: Path, clean: None) -> None:
    (tmp_path / "file").write_text("")
    done = pymigrate("--root", tmp_path / "file", "create", "-b", bundle, OWN, check=False)
    assert str(tmp_path / "file") in error_of(done)
    small = tmp_path / "small"
    small.mkdir()
    for inodes in range(2, 9):  # each of the files that create makes is the one that there is no room for
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=1m,nr_inodes={inodes}", "x", small], check=True)
        try:
            done = pymigrate("--root", small / "root", "create", "-b", bundle, OWN, check=False)
            if done.returncode:
                assert str(small / "root") in error_of(done)
                assert "No space left" in done.stderr
            pymigrate("--root", small / "root", "delete", "--force", OWN)
            assert not (small / "root").exists() or list((small / "root").iterdir()) == []
        finally:
            subprocess.run(["umount", small], check=True)
