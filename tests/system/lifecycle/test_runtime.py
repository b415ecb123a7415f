"""The runtime core with real containers on this machine."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.hosts import PYMIGRATE, write_bundle
from tests.support.leaks import leaks, left
from tests.system.conftest import Local


def run(pymigrate: Local, tmp_path: Path, script: str, **changes: object) -> "subprocess.CompletedProcess[str]":
    write_bundle(tmp_path / "b", script, **changes)
    return pymigrate("run", "-b", tmp_path / "b", "c", check=False)


def test_output_and_exit_status_come_through(pymigrate: Local, tmp_path: Path) -> None:
    done = run(pymigrate, tmp_path, "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    assert pymigrate("list", "-q").stdout == ""


def test_death_by_signal_is_128_and_the_signal(pymigrate: Local, tmp_path: Path) -> None:
    assert run(pymigrate, tmp_path, "sh -c 'kill -9 $$'; exit $?").returncode == 137


def _oom_score(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


@pytest.mark.parametrize("asked", [None, 700])
def test_the_monitor_is_the_last_to_be_killed_when_memory_runs_out(
    pymigrate: Local, tmp_path: Path, asked: int | None
) -> None:
    """The container has what config.json says, or else what the caller has; its monitor the lowest that is allowed."""
    write_bundle(tmp_path / "b", "sleep 1000")
    config = json.loads((tmp_path / "b/config.json").read_text())
    config["process"] |= {} if asked is None else {"oomScoreAdj": asked}
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    script = 'echo 500 > /proc/self/oom_score_adj && exec "$@"'
    subprocess.run(["sh", "-c", script, "sh", *pymigrate.argv("run", "-d", "-b", tmp_path / "b", "c")], check=True)
    state = pymigrate.state("c")
    held = int(Path("/proc/self/status").read_text().split("CapEff:")[1].split()[0], 16)
    lowest = -1000 if held >> 24 & 1 else _oom_score("self")  # CAP_SYS_RESOURCE
    assert (_oom_score(state["pid"]), _oom_score(state["monitor_pid"])) == (asked or 500, lowest)


def test_life_of_a_container(pymigrate: Local, bundle: Path) -> None:
    pymigrate("create", "-b", bundle, "--pid-file", bundle / "pid", "c")
    state = json.loads(pymigrate("state", "c").stdout)
    assert (state["status"], state["id"], state["bundle"]) == ("created", "c", str(bundle))
    assert state["pid"] == int((bundle / "pid").read_text())
    assert pymigrate("logs", "c").stdout == ""
    pymigrate("start", "c")
    assert json.loads(pymigrate("state", "c").stdout)["status"] == "running"
    again = pymigrate("start", "c", check=False)
    assert (again.returncode, "already running" in again.stderr) == (5, True)
    refused = pymigrate("delete", "c", check=False)
    assert (refused.returncode, "cannot delete" in refused.stderr) == (5, True)
    pidfd = os.pidfd_open(pymigrate.state("c")["monitor_pid"])
    pymigrate("kill", "c", "KILL")
    from runtime.linux.processes import wait_exit

    assert wait_exit(pidfd, 10)
    os.close(pidfd)
    assert json.loads(pymigrate("state", "c").stdout)["status"] == "stopped"
    assert json.loads((pymigrate.root / "c" / "exit.json").read_text())["status"] == 137
    assert "container not running" in pymigrate("kill", "c", check=False).stderr
    assert "cannot start a container that has stopped" in pymigrate("start", "c", check=False).stderr
    pymigrate("delete", "c")
    assert "does not exist" in pymigrate("state", "c", check=False).stderr


def test_nothing_is_left_behind(pymigrate: Local, bundle: Path) -> None:
    """Mounts, cgroups, processes, files: the same after some rounds as before, with kills in between."""
    own = f"left-{os.getpid()}"
    before = leaks(pymigrate.root, own)
    for number in range(6):
        name = f"{own}-{number}"
        pymigrate("create", "-b", bundle, name)
        if number % 3:
            pymigrate("start", name)
        if number % 3 == 2:
            os.kill(pymigrate.state(name)["monitor_pid"], signal.SIGKILL)
        pymigrate("delete", "--force", name)
    assert left(before, pymigrate.root, own) == []


def test_create_that_is_killed_can_be_deleted(pymigrate: Local, bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "30"]}]}
    (bundle / "config.json").write_text(json.dumps(config))
    process = subprocess.Popen([*PYMIGRATE, "--root", str(pymigrate.root), "create", "-b", str(bundle), "c"])
    deadline = time.monotonic() + 20
    while not ((pymigrate.root / "c" / "state.json").exists() and pymigrate.state("c")["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    pymigrate("delete", "--force", "c")
    assert not (pymigrate.root / "c").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "a" * 300, "a b", "ä"])
def test_bad_ids_are_refused_and_make_nothing(pymigrate: Local, bundle: Path, name: str) -> None:
    done = pymigrate("create", "-b", bundle, name, check=False)
    assert done.returncode == 6
    assert "invalid container id" in done.stderr
    assert not list(bundle.parent.glob("x")) and not list(pymigrate.root.glob("*/state.json"))  # noqa: PT018


def test_id_in_use_changes_nothing(pymigrate: Local, bundle: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "c")
    before = pymigrate.state("c")
    done = pymigrate("create", "-b", bundle, "c", check=False)
    assert (done.returncode, "already exists" in done.stderr) == (5, True)
    assert pymigrate.state("c") == before


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("process", {"args": [], "cwd": "/"}, "config.json: process.args: must be a non-empty"),
        ("process", {"args": ["x"], "cwd": "rel"}, "config.json: process.cwd: must be an absolute path"),
        ("process", {"args": ["sh"], "cwd": "/", "terminal": True}, "process.terminal"),
        ("root", {"path": 7}, "config.json: root.path: must be a string"),
        ("mounts", [{"destination": "/a/../b", "type": "tmpfs"}], "mounts[0].destination"),
        ("linux", {"namespaces": [{"type": "warp"}]}, "linux.namespaces[0].type"),
        ("linux", {"namespaces": []}, "must include type mount"),
        ("ociVersion", "2.0.0", "config.json: ociVersion"),
    ],
)
def test_malformed_config_names_the_field(
    pymigrate: Local, bundle: Path, field: str, value: object, words: str
) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config[field] = value
    (bundle / "config.json").write_text(json.dumps(config))
    done = pymigrate("create", "-b", bundle, "c", check=False)
    assert done.returncode == 6, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (pymigrate.root / "c").exists()


def test_program_that_is_not_there(pymigrate: Local, bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["process"]["args"] = ["no-such-program"]
    (bundle / "config.json").write_text(json.dumps(config))
    done = pymigrate("create", "-b", bundle, "c", check=False)
    assert done.returncode == 1
    assert "executable file not found in $PATH" in done.stderr
    assert not (pymigrate.root / "c").exists()


def test_the_container_sees_only_itself(pymigrate: Local, tmp_path: Path) -> None:
    script = (
        "hostname; cat /proc/1/comm; ls /proc/self/fd | wc -l; cat /proc/self/mounts | cut -d' ' -f2 | grep -c /home;"
        "ip -o link | wc -l; touch /x 2>&1; echo y > /proc/sys/kernel/hostname; cat /proc/keys; id -u; "
        "cat /proc/1/cgroup"
    )
    done = run(pymigrate, tmp_path, script, hostname="inside")
    lines = done.stdout.splitlines()
    assert lines[:5] == ["inside", "sh", "4", "0", "1"]
    assert "Read-only file system" in lines[5]
    assert "can't create /proc/sys/kernel/hostname" in done.stderr
    assert lines[6] == "0"
    assert all(line.rpartition(":")[2] == "/" for line in lines[7:])


def test_descriptors_of_the_caller_do_not_reach_the_container(pymigrate: Local, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "ls -l /proc/1/fd")
    secret = os.open("/etc/hostname", os.O_RDONLY)
    done = pymigrate("run", "-b", tmp_path / "b", "c", pass_fds=[secret])
    os.close(secret)
    assert "hostname" not in done.stdout


def test_capabilities_limits_and_user(pymigrate: Local, tmp_path: Path) -> None:
    from runtime.spec.default import default_spec

    process = default_spec()["process"] | {
        "user": {"uid": 1000, "gid": 1001, "additionalGids": [7]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 50, "hard": 60}],
        "oomScoreAdj": 123,
    }
    script = "id; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; grep -E 'CapBnd|NoNewPrivs' /proc/self/status"
    lines = run(pymigrate, tmp_path, script, process=process).stdout.splitlines()
    assert lines[0].startswith("uid=1000 gid=1001")
    assert "7" in lines[0].split("groups=")[1]
    assert lines[1:4] == ["50", "60", "123"]
    assert lines[4].split() == ["CapBnd:", f"{1 << 5 | 1 << 10 | 1 << 29:016x}"]
    assert lines[5].split() == ["NoNewPrivs:", "1"]


def test_mount_targets_stay_inside_the_rootfs(pymigrate: Local, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    write_bundle(tmp_path / "b", "ls /evil/", root={"path": "rootfs", "readonly": False})
    (tmp_path / "b" / "rootfs" / "evil").symlink_to(outside)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["mounts"].append({"destination": "/evil/here", "type": "tmpfs", "source": "tmpfs"})
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    pymigrate("run", "-b", tmp_path / "b", "c", check=False)
    assert list(outside.iterdir()) == []


def test_hooks_get_the_state(pymigrate: Local, tmp_path: Path) -> None:
    out = tmp_path / "hooks"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"cat >> {out}; echo >> {out}"]}
    points = ("createRuntime", "createContainer", "poststart", "poststop")
    run(pymigrate, tmp_path, "true", hooks={point: [hook] for point in points})
    states = [json.loads(line) for line in out.read_text().splitlines()]
    assert [state["status"] for state in states] in (
        ["creating", "creating", "running", "stopped"], ["creating", "creating", "stopped", "stopped"],
    )  # fmt: skip
    assert {state["id"] for state in states} == {"c"}


def test_failing_hook_stops_the_creation(pymigrate: Local, tmp_path: Path) -> None:
    done = run(pymigrate, tmp_path, "true", hooks={"createRuntime": [{"path": "/bin/false"}]})
    assert done.returncode == 1
    assert "hooks.createRuntime[0] (/bin/false): exit status 1" in done.stderr
    assert not (pymigrate.root / "c").exists()


def test_exec(pymigrate: Local, bundle: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "c")
    done = pymigrate(
        "exec",
        "-e",
        "A=b",
        "--cwd",
        "/tmp",
        "-u",
        "5:6",
        "c",
        "sh",
        "-c",
        "echo $A; pwd; id -u; id -g; exit 9",
        check=False,
    )
    assert (done.returncode, done.stdout) == (9, "b\n/tmp\n5\n6\n")
    assert pymigrate("exec", "c", "cat", input="x", stdin=None).stdout == "x"
    gone = pymigrate("exec", "c", "nothing", check=False)
    assert (gone.returncode, "executable file not found" in gone.stderr) == (255, True)


def test_logs(pymigrate: Local, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "for i in 1 2 3; do echo $i; done; echo e >&2; sleep 60")
    pymigrate("run", "-d", "-b", tmp_path / "b", "c")
    deadline = time.monotonic() + 10
    while pymigrate("logs", "c").stderr != "e\n" and time.monotonic() < deadline:
        pass
    assert pymigrate("logs", "c").stdout == "1\n2\n3\n"
    assert pymigrate("logs", "--tail", "0", "c").stdout == ""
    stamp, line = pymigrate("logs", "--tail", "2", "-t", "c").stdout.split()
    assert stamp.endswith("Z") and line == "3"  # noqa: PT018


def test_broken_state_is_named_and_can_be_removed(pymigrate: Local, bundle: Path) -> None:
    pymigrate("run", "-d", "-b", bundle, "good")
    (pymigrate.root / "bad").mkdir()
    for text in ("", "{", "[]", '{"ociVersion": "1.2.0"}'):
        (pymigrate.root / "bad" / "state.json").write_text(text)
        done = pymigrate("state", "bad", check=False)
        assert done.returncode == 6
        assert "state.json" in done.stderr
        assert pymigrate("list", "-q").stdout == "good\n"
    pymigrate("delete", "--force", "bad")
    assert not (pymigrate.root / "bad").exists()


def test_limits_are_set(pymigrate: Local, bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    config["linux"]["resources"] |= {"memory": {"limit": 64 << 20}, "pids": {"limit": 20}, "cpu": {"shares": 512}}
    (bundle / "config.json").write_text(json.dumps(config))
    pymigrate("create", "-b", bundle, "c")
    paths = pymigrate.state("c")["cgroup_paths"]
    v1 = {"memory": "memory.limit_in_bytes", "pids": "pids.max", "cpu": "cpu.shares"}
    v2 = {"memory": "memory.max", "pids": "pids.max", "cpu": "cpu.weight"}
    values = []
    for controller in ("memory", "pids", "cpu"):
        place = paths.get(controller)
        file = Path(place, v1[controller]) if place else Path(paths[""], v2[controller])
        values.append(file.read_text().strip())
    assert values[:2] == [str(64 << 20), "20"]
    assert values[2] in ("512", "20")
