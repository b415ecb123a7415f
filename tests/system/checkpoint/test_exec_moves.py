"""What `exec --detach` starts belongs to the container: it moves along."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.hosts import COUNT
from tests.system.conftest import Lab, Local

SECOND = "j=0; while :; do j=$((j+1)); echo x$j >&2; usleep 20000; done"


def test_it_is_a_child_of_init(pymigrate: Local, counting: Path) -> None:
    pymigrate("run", "-d", "-b", counting, "c")
    pymigrate("exec", "-d", "c", "sh", "-c", "echo $PPID >&2; readlink /proc/self/fd/0; cat /proc/self/stat; sleep 60")
    own = pymigrate.state("c")
    words: list[str] = []
    while len(words) < 3:
        words = [line for line in pymigrate("logs", "c").stdout.splitlines() if not line.isdigit()]
        words = [*pymigrate("logs", "c").stderr.split(), *words]
    assert words[:2] == ["1", "/dev/null"]
    assert words[2].split()[3] != "0"
    children = Path(f"/proc/{own['pid']}/task/{own['pid']}/children").read_text().split()
    named = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children]
    assert any(line.startswith(b"sleep") for line in named)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_its_starter_has_closed_streams(pymigrate: Local, counting: Path, closed: str) -> None:
    pymigrate("run", "-d", "-b", counting, "c")
    argv = pymigrate.argv("exec", "-d", "c", "sh", "-c", "readlink /proc/self/fd/0; echo out; echo err >&2; cat")
    subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *argv], check=True, timeout=60)
    words: set[str] = set()
    while len(words) < 3:
        done = pymigrate("logs", "c")
        words = {line for line in (done.stdout + done.stderr).splitlines() if not line.isdigit()}
    assert words == {"/dev/null", "out", "err"}


def test_there_and_back(lab: Lab) -> None:
    lab.run(script=f"sleep 0.01 & {COUNT}")
    lab.on("host1", "pymigrate", "exec", "-d", "web", "sh", "-c", f"echo $$ > /tmp/pid; {SECOND}")
    # CRIU 4.2 mistakes a zombie for another when its parent's pid inside is that of another process outside, which low
    # numbers, one soon after the other, bring about.
    lab.wait_count("host1", 40)
    lab.on("host1", "pymigrate", "exec", "-d", "web", "sh", "-c", "(exit 3) & exec sleep 1000")  # a zombie
    for source, target in (("host1", "host2"), ("host2", "host1")):
        count = lab.wait_count(source, 1)  # the last line may be the other one's
        assert lab.on(source, "pymigrate", "validate", "web", target).returncode == 0
        lab.on(source, "pymigrate", "move", "web", target)
        second = numbers(lab, target)
        while not second or numbers(lab, target)[-1] <= second[-1]:
            second = second or numbers(lab, target)
        second = numbers(lab, target)
        assert second == list(range(1, len(second) + 1))
        inside = "cat /tmp/pid; cat /proc/$(cat /tmp/pid)/cmdline | tr '\\0' ' '; cat /proc/$(cat /tmp/pid)/cgroup"
        pid, *rest = lab.on(target, "pymigrate", "exec", "web", "sh", "-c", inside).stdout.split()
        assert rest[:2] == ["sh", "-c"]
        own = lab.on(target, "pymigrate", "exec", "web", "cat", "/proc/1/cgroup").stdout.split()
        assert rest[-len(own) :] == own
        assert int(pid) > 1
        assert (
            "Z"
            in lab.on(target, "pymigrate", "exec", "web", "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null; true").stdout
        )
        lab.on(target, "pymigrate", "exec", "web", "kill", "-0", pid)
        assert count > 0


def numbers(lab: Lab, host: str) -> list[int]:
    return [int(line[1:]) for line in lab.on(host, "pymigrate", "logs", "web").stderr.split() if line[0] == "x"]


def test_the_foreground_one_is_named(lab: Lab) -> None:
    lab.run()
    session = lab.start("host1", "pymigrate", "exec", "web", "sh", "-c", "echo here; exec sleep 60")
    try:
        assert session.stdout is not None
        assert session.stdout.readline() == "here\n"
        done = lab.on("host1", "pymigrate", "--json", "validate", "web", check=False)
        (blocker,) = json.loads(done.stdout)["blockers"]
        assert blocker["rule"] == "exec-session"
        assert "exec web sh -c" in blocker["problem"]
    finally:
        session.terminate()
        session.communicate(timeout=20)


def test_without_output_left(pymigrate: Local, counting: Path, tmp_path: Path) -> None:
    """A container that has closed its own streams: there is nothing that could take the output."""
    pymigrate("run", "-d", "-b", counting, "c")
    done = pymigrate("exec", "-d", "c", "no-such-program", check=False)
    assert (done.returncode != 0, "no-such-program" in done.stderr) == (True, True)
    assert pymigrate("ps", "c").stdout.count("no-such") == 0
