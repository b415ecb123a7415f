"""The verbs that look at a container or change its limits: flags, formats, and words as runc has them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.hosts import COUNT, PYMIGRATE, write_bundle
from tests.system.conftest import Local

# For a pymigrate in another directory: this one's code, not what is installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}


@pytest.fixture
def running(pymigrate: Local, tmp_path: Path) -> Local:
    write_bundle(tmp_path / "b", COUNT)
    pymigrate("run", "-d", "-b", tmp_path / "b", "verbs")
    return pymigrate


def test_ps(running: Local) -> None:
    pid = running.state("verbs")["pid"]
    assert pid in json.loads(running("ps", "--format", "json", "verbs").stdout)
    heading, *lines = running("ps", "verbs").stdout.splitlines()
    assert heading.split()[:2] == ["UID", "PID"]
    assert str(pid) in {line.split()[1] for line in lines}
    assert all(str(pid) in line.split()[:3] for line in lines), lines
    assert running("ps", "verbs", "-o", "pid,comm").stdout.splitlines()[1].split() == [str(pid), "sh"]
    odd = running("ps", "verbs", "-o", "comm", check=False)
    assert (odd.returncode, "the output has no column PID" in odd.stderr) == (2, True)


def test_update(running: Local, tmp_path: Path) -> None:
    running("update", "--memory", "64m", "--pids-limit=33", "--cpu-share", "512", "verbs")
    stats = json.loads(running("events", "--stats", "verbs").stdout)
    assert (stats["type"], stats["id"]) == ("stats", "verbs")
    assert stats["data"]["memory"]["usage"]["limit"] == 64 << 20
    assert stats["data"]["pids"]["limit"] == 33
    (tmp_path / "limits").write_text(json.dumps({"pids": {"limit": 44}}))
    running("update", "--resources", tmp_path / "limits", "verbs")
    running("update", "-r", "-", "verbs", input=json.dumps({"memory": {"limit": 128 << 20}}), stdin=None)
    stats = json.loads(running("events", "--stats", "verbs").stdout)
    assert stats["data"]["memory"]["usage"]["limit"] == 128 << 20
    assert stats["data"]["pids"]["limit"] == 44


def test_update_as_runc_is_asked_to(running: Local) -> None:
    running("update", "--memory", "0.5g", "--kernel-memory", "1g", "--kernel-memory-tcp", "1g", "verbs")
    running("update", "--kernel-memory", "1g", "verbs")
    stats = json.loads(running("events", "--stats", "verbs").stdout)
    assert stats["data"]["memory"]["usage"]["limit"] == 512 << 20


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], 2, "nothing to change"),
        (["--l3-cache-schema", "L3:0=f"], 2, "--l3-cache-schema: linux.intelRdt is not supported"),
        (["--mem-bw-schema", "MB:0=70"], 2, "--mem-bw-schema: linux.intelRdt is not supported"),
        (["--memory", "much"], 2, "--memory much: must be a number"),
        (["--memory", "-5"], 6, "update: memory.limit: must be"),
        (["--resources", "/no/such"], 6, "/no/such: no such file"),
    ],
)
def test_what_cannot_be_updated(running: Local, flags: list[str], code: int, words: str) -> None:
    done = running("update", *flags, "verbs", check=False)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr


def test_events_tell_when_memory_ran_out(pymigrate: Local, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "read go < /tmp/go; x=$(head -c 60000000 /dev/zero | tr '\\0' x); echo survived")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["process"]["args"][2] = "mkfifo /tmp/go; " + config["process"]["args"][2]
    config["linux"]["resources"]["memory"] = {"limit": 20 << 20, "swap": 20 << 20}
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    pymigrate("run", "-d", "-b", tmp_path / "b", "verbs")
    events = subprocess.Popen(
        pymigrate.argv("events", "--interval", "200ms", "verbs"), stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert events.stdout is not None
    assert json.loads(events.stdout.readline())["type"] == "stats"
    pymigrate("exec", "-d", "verbs", "sh", "-c", "echo > /tmp/go")
    kinds = {json.loads(line)["type"] for line in events.stdout}  # ends with the container
    assert "oom" in kinds
    assert events.wait(10) == 0
    events.stdout.close()


def test_pause_and_resume(running: Local) -> None:
    running("pause", "verbs")
    assert json.loads(running("list", "-f", "json").stdout)[0]["status"] == "paused"
    again = running("pause", "verbs", check=False)
    assert (again.returncode, "it is paused" in again.stderr) == (5, True)
    running("resume", "verbs")
    assert json.loads(running("state", "verbs").stdout)["status"] == "running"
    again = running("resume", "verbs", check=False)
    assert (again.returncode, "it is running" in again.stderr) == (5, True)


def test_words_that_engines_look_for(pymigrate: Local, tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    missing = pymigrate("--log", log, "--log-format=json", "kill", "nobody", "9", check=False)
    assert "does not exist" in missing.stderr
    entry = json.loads(log.read_text())
    assert (entry["level"], "does not exist" in entry["msg"], set(entry)) == ("error", True, {"level", "msg", "time"})
    write_bundle(tmp_path / "b", "true")
    pymigrate("create", "-b", tmp_path / "b", "verbs")
    pymigrate("kill", "verbs", "9")
    while json.loads(pymigrate("state", "verbs").stdout)["status"] != "stopped":
        pass
    assert "container not running" in pymigrate("kill", "verbs", "15", check=False).stderr
    assert pymigrate("delete", "--force", "nobody").stderr == ""
    assert pymigrate("--version").stdout.startswith("pymigrate version ")
    assert "flag provided but not defined: -what" in pymigrate("start", "-what", "verbs", check=False).stderr
    assert pymigrate("-root", tmp_path / "elsewhere", "list", "-quiet").stdout == ""


def test_exec_fails_with_a_number_of_its_own(running: Local) -> None:
    for number in (4, 6, 128 + 9):
        assert running("exec", "verbs", "sh", "-c", f"exit {number}", check=False).returncode == number
    for argv in (
        ("verbs", "nosuch"),
        ("verbs",),
        ("nobody", "true"),
        ("--nosuch", "verbs", "true"),
        ("bad/id", "true"),
    ):
        done = running("exec", *argv, check=False)
        assert (done.returncode, done.stderr.startswith("pymigrate: error: ")) == (255, True), argv


@pytest.mark.parametrize("number", ["x", "-1", "4294967295", "9" * 5000, "\u00b2"])
def test_numbers_that_are_none(running: Local, number: str) -> None:
    for argv in (("exec", "-u", number, "verbs", "true"), ("exec", "-u", f"1:{number}", "verbs", "true"),
                 ("exec", "-g", number, "verbs", "true"), ("kill", "verbs", number)):  # fmt: skip
        done = running(*argv, check=False)
        assert (done.returncode, number[:9] in done.stderr or "--additional-gids" in done.stderr) == (
            255 if argv[0] == "exec" else 2, True
        ), done  # fmt: skip
        assert "internal error" not in done.stderr


def test_environment_of_exec(running: Local) -> None:
    flags = ("-e", "PATH=/nowhere", "-e", "A=1", "-e", "A=2", "-e", "PATH=/bin")
    assert running("exec", *flags, "verbs", "sh", "-c", "echo $A $PATH").stdout == "2 /bin\n"


def test_exec_in_a_cgroup_below(running: Local) -> None:
    paths = running.state("verbs")["cgroup_paths"]
    controllers = [name for name in paths if name]
    below = [Path(paths[name], "x") for name in (*controllers[:1], *([""] if "" in paths else []))]
    for path in below:
        path.mkdir(exist_ok=True)

    def cgroups(*flags: str) -> dict[str, str]:
        lines = running("exec", *flags, "verbs", "cat", "/proc/self/cgroup").stdout.splitlines()
        return {name: path for line in lines for _, names, path in [line.split(":", 2)] for name in names.split(",")}

    one = controllers[0] if controllers else ""
    assert cgroups()[one] == "/"
    found = cgroups("--cgroup", f"{one}:x", "--cgroup", f"{controllers[-1] if controllers else one}:/")
    assert (found[one], found[controllers[-1] if controllers else one]) == ("/x", "/" if controllers else "/x")
    for wrong, words in (("nosuch:/x", "no cgroup of a controller 'nosuch'"), (f"{one}:../..", "no such cgroup below")):
        assert words in running("exec", "--cgroup", wrong, "verbs", "true", check=False).stderr
    for path in below:
        path.rmdir()


def test_whether_it_lives(running: Local) -> None:
    running("kill", "verbs", "0")
    running("kill", "verbs", "KILL")
    while json.loads(running("state", "verbs").stdout)["status"] != "stopped":
        pass
    assert "container not running" in running("kill", "verbs", "0", check=False).stderr


def test_help_of_a_verb(pymigrate: Local) -> None:
    assert pymigrate("help", "exec").stdout == pymigrate("exec", "--help").stdout
    assert pymigrate("help").stdout == pymigrate("--help").stdout


def test_a_relative_root(pymigrate: Local, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    write_bundle(bundle, "sleep 60")
    argv = [*PYMIGRATE, "--root", os.path.relpath(pymigrate.root, tmp_path), "run", "-d", "-b", str(bundle), "verbs"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=30, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert json.loads(pymigrate("state", "verbs").stdout)["status"] == "running"


def test_a_log_does_not_grow_without_end(pymigrate: Local, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", f"yes {'x' * 4000} | head -c 40000000; echo; echo the end; sleep 60")
    pymigrate("run", "-d", "-b", tmp_path / "b", "verbs")
    following = subprocess.Popen(pymigrate.argv("logs", "-f", "verbs"), stdout=subprocess.PIPE)
    assert following.stdout is not None
    assert any(line == b"the end\n" for line in following.stdout)
    pymigrate("kill", "verbs", "KILL")
    following.communicate(timeout=20)
    sizes = [path.stat().st_size for path in (pymigrate.root / "verbs").glob("log*")]
    assert len(sizes) == 2
    assert max(sizes) <= 16 << 20
    assert pymigrate("logs", "--tail", "1", "verbs").stdout == "the end\n"
